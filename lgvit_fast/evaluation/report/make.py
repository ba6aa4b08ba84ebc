"""The whole report: record, replay policies, measure every way and rival, decide."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgvit_fast.certificate import Certificate
from lgvit_fast.data.batches import BadImage, Batch, Key, Source
from lgvit_fast.data.seeds import generator
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.deploy.dense import TITLES, export_dense, quantize, why_not
from lgvit_fast.deploy.exporter import export
from lgvit_fast.evaluation.recording import Recording, record
from lgvit_fast.evaluation.report.measuring import measure_all
from lgvit_fast.evaluation.report.rivals import input_spec, load_rival
from lgvit_fast.evaluation.report.rows import ENGINES, PRECISIONS, LeftOut, Row, Way
from lgvit_fast.evaluation.report.verdict import Verdict, verdicts
from lgvit_fast.evaluation.report.worker import Task
from lgvit_fast.evaluation.tradeoff import Point, answers, candidates, measure, sweep
from lgvit_fast.machine import machine
from lgvit_fast.model import LGViT
from lgvit_fast.policies import to_dict

__all__ = ["FEWEST_IMAGES", "Report", "Sample", "make_report"]

FEWEST_IMAGES = 20
_CALIBRATION_IMAGES = 128
_CALIBRATED_ON_THEM = (
    "All images are reported on, so early exit in int8 was calibrated on some of them: its accuracy on"
    " others may be lower."
)


@dataclass(frozen=True)
class Sample:
    """An image to show.

    Attributes:
        picture: `[C, H, W]`, preprocessed.
        name: its file, or where it is in the data.
        target: its class.
        prediction: what it is answered.
        exit: where it leaves, from 0; E for the final classifier.
    """

    picture: Tensor
    name: str
    target: int
    prediction: int
    exit: int


@dataclass(frozen=True)
class Report:
    """Everything that stands on the page.

    Attributes:
        name: of the model.
        data: of the images.
        notes: what else the reader should know, such as how the model was trained.
        recording: what every classifier says of the images.
        heads: of the exits, shallow to deep.
        class_names: K names.
        chosen: the model's policy on all images.
        points: other thresholds of confidence.
        certificate: the policy's, or None.
        samples: some images, by exit.
        spec: how the samples were preprocessed.
        rows: what was measured.
        left_out: what was not, and why.
        verdicts: one a batch size.
        tolerance: points of accuracy that may be lost.
        rounds: of the stopwatch.
        timed: images that were timed.
        machine: what the figures were measured on.
    """

    name: str
    data: str
    notes: tuple[str, ...]
    recording: Recording
    heads: tuple[str, ...]
    class_names: tuple[str, ...]
    chosen: Point
    points: tuple[Point, ...]
    certificate: Certificate | None
    samples: tuple[Sample, ...]
    spec: InputSpec
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]
    verdicts: tuple[Verdict, ...]
    tolerance: float
    rounds: int
    timed: int
    machine: dict[str, Any]


class _Part:
    """Some images of a source, by their positions."""

    def __init__(self, source: Source, positions: Sequence[int]) -> None:
        self.source, self.positions = source, tuple(positions)
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        return self.source.__getitems__([(epoch, self.positions[place]) for epoch, place in keys])

    def name(self, place: int) -> str:
        """The file behind an image, or its number."""
        named: Any = self.source
        position = self.positions[place]
        if not hasattr(named, "name"):
            return f"image {position}"
        return str(named.name(getattr(named, "positions", range(position + 1))[position]))


def make_report(
    model: LGViT,
    open_source: Callable[[InputSpec], Source],
    *,
    name: str,
    data: str = "",
    notes: Sequence[str] = (),
    rivals: Sequence[str] = (),
    engines: Sequence[str] = tuple(ENGINES),
    precisions: Sequence[str] = PRECISIONS,
    batch_sizes: Sequence[int] = (1, 32),
    images: int | None = 1000,
    timing_images: int = 64,
    rounds: int = 5,
    tolerance: float = 1.0,
    batch_size: int = 32,
    relabel: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure a model under its own policy beside what one would use instead of early exits.

    The full model, early exit, and each rival, on PyTorch (eager, compiled, and `Engine`), ONNX Runtime
    and OpenVINO, in float32 and int8: each answers the same images, and is timed in a process of its
    own, in turns. What cannot be measured is left out with its reason. Takes minutes.

    Args:
        model: in eval mode, on the device to measure on.
        open_source: the labelled images, as an `InputSpec` wants them; a rival may want others than
            the model. Sources are pickled. Use images that took no part in training or in choosing
            the policy.
        name: of the model, for the page.
        data: of the images, likewise.
        notes: sentences for the page.
        rivals: see `rivals.load_rival`.
        engines: keys of `ENGINES`.
        precisions: of `PRECISIONS`; int8 is for the runtimes.
        batch_sizes: images a call, to time at.
        images: at most so many, drawn at random; None takes all.
        timing_images: how many of them are timed.
        rounds: timed passes over these, each way.
        tolerance: points of accuracy that may be lost.
        batch_size: of the passes that are not timed.
        relabel: maps the images' class numbers to the model's.
        seed: of the draw.
        progress: gets lines that say what is being done.

    Raises:
        ValueError: no labels, one class, fewer than 20 readable images, NaN or +inf logits, bad
            arguments, or a rival whose classes do not match.
        FileNotFoundError: a rival that is not there.
        RuntimeError: the model is in train mode, or the full model could not be measured.
    """
    _check(engines, precisions, batch_sizes, rounds, timing_images, images)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r}, expected at least 0 points")
    if to_dict(model.policy) is None:
        raise ValueError(f"policy={model.policy!r} cannot be saved, expected one that can be")
    if model.training:
        raise RuntimeError("make_report needs eval mode: call model.eval() first")
    device = next(model.parameters()).device
    loaded = {rival: load_rival(rival, model.num_classes, model.class_names) for rival in rivals}
    spec = InputSpec.of(model.backbone)
    source = open_source(spec)
    if len(source) < FEWEST_IMAGES:
        raise ValueError(f"{len(source)} images, expected at least {FEWEST_IMAGES}")
    order = torch.randperm(len(source), generator=generator(seed, "report"))[: images or None]
    drawn = sorted(order.tolist())
    progress(f"records what every exit says of {len(drawn)} images")
    readable: list[int] = []
    bad: list[BadImage] = []
    found = _read(source, drawn, batch_size, readable, bad, relabel)
    recording = _sound(record(model, found), bad)
    part = _Part(source, readable)
    draw = torch.randperm(len(part), generator=generator(seed, "timed"))[:timing_images]
    timed = tuple(draw.tolist())

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lgvit-report-") as temporary:
        planned, left_out = _plan(model, loaded, engines, precisions, device)
        rest = [place for place in range(len(source)) if place not in set(drawn)]
        calibration = part if not rest else _Part(source, rest[:_CALIBRATION_IMAGES])
        if not rest and any(way.early and way.precision == "int8" for way in planned):
            notes = [*notes, _CALIBRATED_ON_THEM]
        exports = _Exports(Path(temporary), model, loaded, calibration)
        tasks = []
        for way in planned:
            try:
                place = exports.of(way)
            except Exception as error:  # exporters raise anything
                left_out.append(LeftOut(way, " ".join(f"{error}".split())[:300]))
                continue
            own = part
            if way.rival:
                own = _Part(open_source(input_spec(loaded[way.rival])), readable)
            tasks.append(
                Task(way, place, model.num_classes, str(device), own, batch_size, timed)
            )  # fmt: skip
        rows, failed = measure_all(
            tasks,
            recording.labels,
            recording.logits[-1].argmax(-1),
            num_blocks=model.num_blocks,
            batch_sizes=tuple(dict.fromkeys(batch_sizes)),
            rounds=rounds,
            progress=progress,
        )
    left_out += failed
    if not any(row.way == Way("eager") for row in rows):
        reason = next((why for way, why in left_out if way == Way("eager")), "not asked for")
        raise RuntimeError(f"the full model could not be measured: {reason}")
    chosen = measure(recording, model.policy)
    tried = candidates("confidence", len(model.exits), model.num_classes)
    return Report(
        name=name,
        data=data,
        notes=tuple(notes),
        recording=recording,
        heads=tuple(str(exit.head) for exit in model.exits),
        class_names=tuple(model.class_names or map(str, range(model.num_classes))),
        chosen=chosen,
        points=tuple(sweep(recording, tried)),
        certificate=model.certificate,
        samples=tuple(_samples(part, recording, model)),
        spec=spec,
        rows=tuple(rows),
        left_out=tuple(left_out),
        verdicts=tuple(verdicts(rows, tolerance)),
        tolerance=tolerance,
        rounds=rounds,
        timed=len(timed),
        machine=machine(),
    )


def _check(
    engines: Sequence[str],
    precisions: Sequence[str],
    batch_sizes: Sequence[int],
    rounds: int,
    timing_images: int,
    images: int | None,
) -> None:
    for argument, given, known in (
        ("engines", engines, tuple(ENGINES)),
        ("precisions", precisions, PRECISIONS),
    ):
        strange = [value for value in given if value not in known]
        if strange or not given:
            raise ValueError(f"{argument}={tuple(given)}, expected some of {', '.join(known)}")
    if "eager" not in engines or "float32" not in precisions:
        raise ValueError("engines and precisions need eager and float32, to compare with")
    if not batch_sizes or min(*batch_sizes, rounds, timing_images) < 1:
        raise ValueError(
            f"batch_sizes={tuple(batch_sizes)}, rounds={rounds}, timing_images={timing_images}:"
            " expected at least 1 each"
        )
    if images is not None and images < FEWEST_IMAGES:
        raise ValueError(f"images={images}, expected at least {FEWEST_IMAGES}, or None for all")


def _read(
    source: Source,
    positions: Sequence[int],
    size: int,
    readable: list[int],
    bad: list[BadImage],
    relabel: Callable[[Tensor], Tensor] | None,
) -> Iterator[Batch]:
    """The images in batches; notes which could be read."""
    for start in range(0, len(positions), size):
        chunk = positions[start : start + size]
        batch = source.__getitems__([(0, place) for place in chunk])
        if batch.bad:  # one by one, to see which
            singles = [source.__getitems__([(0, place)]) for place in chunk]
            bad += [image for single in singles for image in single.bad]
            chunk = [p for p, single in zip(chunk, singles, strict=True) if len(single.images)]
            if not chunk:
                continue
            batch = source.__getitems__([(0, place) for place in chunk])
        if batch.targets is None:
            raise ValueError("the images have no labels, and a report compares accuracies")
        readable += chunk
        yield batch if relabel is None else batch._replace(targets=relabel(batch.targets))


def _sound(recording: Recording, bad: list[BadImage]) -> Recording:
    if len(recording) < FEWEST_IMAGES:
        raise ValueError(
            f"{len(recording)} images could be read, expected at least {FEWEST_IMAGES}"
        )
    if len(recording.labels.unique()) == 1:
        raise ValueError(
            f"all images are of class {int(recording.labels[0])}, expected several classes (without"
            " labels a report cannot compare accuracies)"
        )
    broken = recording.logits.isnan().any(-1) | (recording.logits == torch.inf).any(-1)
    if broken.any():
        count = int(broken.any(0).sum())
        raise ValueError(f"logits of {count} of {len(recording)} images hold NaN or +inf")
    return Recording(recording.logits, recording.targets, recording.layers, bad)


def _plan(
    model: LGViT,
    rivals: dict[str, nn.Module],
    engines: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
) -> tuple[list[Way], list[LeftOut]]:
    """The ways to measure, and those that cannot be here."""
    planned: list[Way] = []
    left_out: list[LeftOut] = []
    models = [("", False), ("", True)] if len(model.exits) else [("", False)]
    models += [(name, isinstance(rival, LGViT)) for name, rival in rivals.items()]
    for rival, early in models:
        for engine in engines:
            if engine == "engine" and rival and not early:
                continue  # it runs early-exit models and their backbones
            for precision in precisions:
                way = Way(engine, precision, early, rival)
                if engine not in TITLES:
                    if precision == "float32":
                        planned.append(way)
                    continue
                reason = why_not(engine, precision)
                if device.type != "cpu":
                    reason = f"it runs on the CPU, the report is of {device.type}"
                if reason:
                    left_out.append(LeftOut(way, reason))
                else:
                    planned.append(way)
    return planned, left_out


class _Exports:
    """What each way loads, made when it is first asked for."""

    def __init__(
        self, folder: Path, model: LGViT, rivals: dict[str, nn.Module], calibration: _Part
    ) -> None:
        self.folder, self.model, self.rivals, self.calibration = folder, model, rivals, calibration
        self._saved = folder / "model"
        model.save_pretrained(self._saved)
        self._made: dict[tuple[str, bool, str, str], str | Exception] = {}

    def of(self, way: Way) -> str:
        """Folder or file for a way.

        Raises:
            Exception: whatever the export raised, at every way that needs it.
        """
        if way.engine not in TITLES:
            return way.rival or str(self._saved)
        dense_int8 = way.precision == "int8" and not way.early  # differs between the runtimes
        key = (way.rival, way.early, way.precision, way.engine if dense_int8 else "")
        if key not in self._made:
            try:
                self._made[key] = self._export(way)
            except Exception as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, Exception):
            raise made
        return made

    def _export(self, way: Way) -> str:
        model = self.rivals[way.rival] if way.rival else LGViT.from_pretrained(self._saved)
        path = self.folder / f"{len(self._made)}-{way.precision}"
        if way.early:
            assert isinstance(model, LGViT)
            keys = [(0, place) for place in range(min(len(self.calibration), _CALIBRATION_IMAGES))]
            options: dict[str, Any] = {}
            if way.precision != "float32":
                options["calibration"] = self.calibration.__getitems__(keys).images
            return str(export(model, path, precision=way.precision, **options))
        path = path.with_suffix(".onnx")
        if way.precision == "int8":
            source = self.of(Way(way.engine, "float32", way.early, way.rival))
            quantize(Path(source), path, way.engine)
        else:
            backbone: Any = model.backbone if isinstance(model, LGViT) else model
            export_dense(backbone, input_spec(model), path)
        return str(path)


def _samples(part: _Part, recording: Recording, model: LGViT, each: int = 12) -> Iterator[Sample]:
    """Up to `each` images an exit, at most a third of them wrongly answered."""
    exits, predictions = answers(recording, model.policy)
    right = predictions == recording.labels
    for exit in range(recording.num_exits + 1):
        here = (exits == exit).nonzero().flatten().tolist()
        wrong = [place for place in here if not right[place]][: each // 3]
        shown = [place for place in here if right[place]][: each - len(wrong)] + wrong
        for place in shown:
            batch = part.__getitems__([(0, place)])
            yield Sample(
                picture=batch.images[0],
                name=part.name(place),
                target=int(recording.labels[place]),
                prediction=int(predictions[place]),
                exit=exit,
            )
