"""What a server counts, for Prometheus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from lgvit_fast.certificate import Certificate

__all__ = ["CONTENT_TYPE", "SHARED_FOLDER", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Set before the first import of prometheus_client: where the processes of one server keep their counts.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters, gauges and histograms of one server, all processes of it together.

    Args:
        layers: blocks after which images may leave, the depth last.
        certificate: the model's, for the drift from its calibration images.
    """

    def __init__(self, layers: Sequence[int], certificate: Certificate | None) -> None:
        self._registry = registry = CollectorRegistry()
        self._layers, self._certificate = tuple(layers), certificate
        self.requests = Counter(
            "lgvit_requests", "Requests answered, by status", ["status"], registry=registry
        )
        self.errors = Counter(
            "lgvit_errors", "Images not answered, by status", ["status"], registry=registry
        )
        self.latency = Histogram(
            "lgvit_request_seconds",
            "From a request's arrival to the end of its answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self.queued = Histogram(
            "lgvit_queued_seconds",
            "An image's time in queues",
            buckets=_SECONDS,
            registry=registry,
        )
        self.computed = Histogram(
            "lgvit_computed_seconds",
            "Time of the runs an image was part of",
            buckets=_SECONDS,
            registry=registry,
        )
        self.exits = Counter(
            "lgvit_images",
            "Images answered, by the block they left at",
            ["layer"],
            registry=registry,
        )
        self.certified = Counter(
            "lgvit_certified_images",
            "Those answered under the certificate's own policy",
            ["layer"],
            registry=registry,
        )
        self.batches = Histogram(
            "lgvit_batch_images",
            "Images of a run, by the block it ends at",
            ["layer"],
            buckets=_IMAGES,
            registry=registry,
        )
        self.queue = Gauge(
            "lgvit_queue_images",
            "Images accepted and not answered",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.level = Gauge(
            "lgvit_policy_level",
            "The policy new images are accepted under, 0 the most cautious",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.evidence = Gauge(
            "lgvit_drift_evidence",
            "Evidence that images leave elsewhere than the calibration images (e-value)",
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self.drift = Gauge(
            "lgvit_drift",
            "1 if the certificate no longer speaks of the images",
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        for layer in self._layers:  # at zero from the start
            self.exits.labels(layer)
            self.batches.labels(layer)

    def ran(self, place: int, images: int) -> None:
        """Count a run of a segment."""
        self.batches.labels(self._layers[place]).observe(images)

    def totals(self) -> dict[str, Any]:
        """The counts that the page shows, as json types."""
        values = self._values()
        exits = self._by_layer(values, "lgvit_images_total")
        return {
            "exits": exits,
            "queue": int(values.get(("lgvit_queue_images", ""), 0)),
            "answered": sum(exits),
            "rejected": int(values.get(("lgvit_requests_total", "429"), 0)),
        }

    def page(self) -> bytes:
        """All of it, in Prometheus's text format."""
        if self._certificate is not None:
            check = self._certificate.check(
                self._by_layer(self._values(), "lgvit_certified_images_total")
            )
            self.evidence.set(check.evidence)
            self.drift.set(not check.alike)
        return generate_latest(self._all())

    def _by_layer(self, values: dict[tuple[str, str], float], name: str) -> list[int]:
        return [int(values.get((name, str(layer)), 0)) for layer in self._layers]

    def _values(self) -> dict[tuple[str, str], float]:
        """Values by their names and the value of their only label."""
        return {
            (sample.name, "".join(sample.labels.values())): sample.value
            for metric in self._all().collect()
            for sample in metric.samples
        }

    def _all(self) -> CollectorRegistry:
        """What the processes of the server have counted, together."""
        if SHARED_FOLDER not in os.environ:
            return self._registry
        _forget_the_dead(Path(os.environ[SHARED_FOLDER]))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry


def _forget_the_dead(shared: Path) -> None:
    """Drop the gauges of processes that were killed; their counts stay."""
    for pid in {int(path.stem.rpartition("_")[2]) for path in shared.glob("gauge_live*_*.db")}:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with suppress(FileNotFoundError):  # another process was faster
                mark_process_dead(pid)  # type: ignore[no-untyped-call]
