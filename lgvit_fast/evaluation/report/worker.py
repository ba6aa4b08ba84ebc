"""The process that one way of answering lives in: it answers all images, or a few against the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.clock import now
from lgvit_fast.data.batches import Source
from lgvit_fast.deploy import Deployed
from lgvit_fast.deploy.dense import TITLES, load_dense
from lgvit_fast.evaluation.report.rows import Way

__all__ = ["Task", "Worker"]

# Images to classes `[B]` and the blocks after which they left `[B]`, None where all run to the end.
Answer = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Task:
    """What a process needs to know.

    Attributes:
        way: what it answers with.
        model: folder of a saved `LGViT`, a rival's name, or what was exported of it: a folder of
            `lgvit_fast.export`, or a file of one ONNX graph.
        num_classes: K.
        device: "cpu", "cuda", ...
        source: the images, as this model wants them.
        batch_size: of the pass over all images.
        timed: positions in the source of the images to time.
    """

    way: Way
    model: str
    num_classes: int
    device: str
    source: Source
    batch_size: int
    timed: tuple[int, ...]


class Worker:
    """Answers the requests of `measure_all`: all images, or a batch size to be timed at."""

    def __init__(self, task: Task) -> None:
        self._task, self._answer = task, _make(task)
        timed = task.source.__getitems__([(0, position) for position in task.timed]).images
        self._timed = timed.to(task.device)

    def __call__(self, request: int | None) -> Any:
        """None: `(classes [n], layers [n] or None)` of all images; B: milliseconds an image."""
        if request is None:
            return _answer_all(self._answer, self._task)
        return _time(self._answer, self._timed, request, torch.device(self._task.device))


def _answer_all(answer: Answer, task: Task) -> tuple[np.ndarray, np.ndarray | None]:
    classes, layers = [], []
    for start in range(0, len(task.source), task.batch_size):
        stop = min(start + task.batch_size, len(task.source))
        images = task.source.__getitems__([(0, place) for place in range(start, stop)]).images
        # a batch of another size would be compiled anew
        padded = images[torch.arange(task.batch_size).clamp(max=len(images) - 1)]
        predicted, left = answer(padded.to(task.device))
        classes.append(predicted[: len(images)].cpu())
        if left is not None:
            layers.append(left[: len(images)].cpu())
    return torch.cat(classes).numpy(), torch.cat(layers).numpy() if layers else None


def _time(answer: Answer, images: Tensor, size: int, device: torch.device) -> float:
    """Milliseconds an image, in full batches."""
    batches = list(_full_batches(images, size))
    began = now(device)
    for batch in batches:
        answer(batch)
    return 1000 * (now(device) - began) / (len(batches) * size)


def _full_batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of exactly `size`: the images in order, over again where they are fewer."""
    for start in range(0, max(len(images) - size + 1, 1), size):
        yield images[torch.arange(start, start + size) % len(images)]


def _make(task: Task) -> Answer:
    """What answers; imports nothing that its way does not need."""
    way = task.way
    if way.engine in TITLES:
        return _deployed(task) if way.early else _graph(task)
    from lgvit_fast.evaluation.report.rivals import load_rival
    from lgvit_fast.model import LGViT

    model: Any = (
        load_rival(way.rival, task.num_classes) if way.rival else LGViT.from_pretrained(task.model)
    )
    model = model.to(task.device).eval()
    if way.early or way.engine == "engine":
        answer = _answering(model, way)

        def early(images: Tensor) -> tuple[Tensor, Tensor | None]:
            found = answer(images)
            return found.prediction, found.exit_layer if way.early else None

        return early
    backbone = model.backbone if isinstance(model, LGViT) else model
    compiled = way.engine == "compiled"
    run = torch.compile(backbone, dynamic=False) if compiled else backbone

    def dense(images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode():
            return run(images).argmax(-1), None

    return dense


def _answering(model: Any, way: Way) -> Callable[[Tensor], Any]:
    """What gives an `Inference` of images; an engine without exits for a full model."""
    from lgvit_fast.inference import Engine

    if way.engine == "eager":
        return cast(Callable[[Tensor], Any], model.infer)
    if way.engine == "compiled":
        return Engine(model, runtime="torch", compile=True)
    return Engine(model, runtime="torch", exits=None if way.early else ())


def _deployed(task: Task) -> Answer:
    deployed = Deployed(task.model, task.way.engine, torch.get_num_threads())

    def early(images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = deployed(images.numpy())
        return torch.from_numpy(found.prediction), torch.from_numpy(found.exit_layer)

    return early


def _graph(task: Task) -> Answer:
    run = load_dense(task.model, task.way.engine, torch.get_num_threads())

    def dense(images: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.from_numpy(run(images.numpy()).argmax(-1)), None

    return dense
