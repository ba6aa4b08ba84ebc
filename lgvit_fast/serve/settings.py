"""What a server may be told."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Limits and batching of a server.

    Attributes:
        batch_size: images a graph runs at most, and waits for.
        max_wait_ms: milliseconds an image waits for others to fill its batch.
        queue: images accepted and not answered; a request that would exceed it gets 429.
        top_k: classes in an answer, at most K.
        max_upload_mb: of a request's body, in MiB.
        max_images: of a request.
        max_pixels: of an image, width times height.
        timeout: seconds, for a body to come in, and for an image to be answered.
        stop_seconds: that a server which is told to stop goes on answering what it has accepted; what
            is left then gets 503. Kubernetes kills after 30.
        slo_ms: milliseconds an image may take from its acceptance to its answer: when more are to be
            expected, images are accepted under bolder thresholds, down to the certified ones. None
            takes the model's own policy for every image.
    """

    batch_size: int = 16
    max_wait_ms: float = 2.0
    queue: int = 256
    top_k: int = 5
    max_upload_mb: float = 32.0
    max_images: int = 64
    max_pixels: int = 25_000_000
    timeout: float = 30.0
    stop_seconds: float = 25.0
    slo_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "queue", "top_k", "max_images", "max_pixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}, expected an integer of at least 1")
        if not 0 <= self.max_wait_ms < float("inf"):
            raise ValueError(f"max_wait_ms={self.max_wait_ms!r}, expected 0 or more")
        for name in ("max_upload_mb", "timeout", "stop_seconds", "slo_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r}, expected a positive number")

    @property
    def max_upload(self) -> int:
        """Bytes of a request's body."""
        return int(self.max_upload_mb * 2**20)

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` wrote."""
        return cls(**json.loads(text))
