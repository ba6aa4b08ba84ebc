"""The ways to answer images that are measured beside each other: dense, published, and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.bench.published_scheme import PublishedScheme
from lgvit_fast.inference import Engine, stream
from lgvit_fast.inference.prepared import prepared_twin
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Replay

__all__ = ["Calls", "Way", "ways"]

Calls = list[Callable[[], Any]]


@dataclass(frozen=True)
class Way:
    """One way to answer images.

    Attributes:
        name: in tables.
        like: the dense way that has the same linear layers and compiler, to measure the share of the
            layer ratio that is realised; its own name for a dense way.
        start: takes images, the policy that scripts them and a batch size, and gives a pass over the
            images as calls to be made, and timed, one by one.
        in_batches: whether each call answers one batch; a stream's calls answer what is ready.
    """

    name: str
    like: str
    start: Callable[[Tensor, Replay, int], Calls]
    in_batches: bool = True


def ways(
    model: LGViT, batch_size: int, compiled: bool = True, exits: Sequence[int] | None = None
) -> list[Way]:
    """All ways that exist on the model's device, `compiled` ones if asked.

    The first is dense timm, eager. With `exits`, an engine that asks only those layers is among them;
    its share is of the layer ratio that all exits promise. The published scheme takes the images of a
    batch one by one, as it must, and in float32, as it is published, whatever the model's dtype.
    """
    dense = "dense timm"
    on_gpu = next(model.parameters()).device.type == "cuda"
    found = [Way(dense, dense, _in_batches(lambda x, _: model.backbone(x)))]
    fast = dense
    if not on_gpu:
        fast = "dense, prepared linears"
        twin = prepared_twin(model.backbone)
        found.append(Way(fast, fast, _in_batches(lambda x, _: twin(x))))
    if compiled:
        name = "dense timm, compiled"
        dense_compiled: Any = torch.compile(model.backbone)
        found.append(Way(name, name, _in_batches(lambda x, _: dense_compiled(x))))
        ours = Engine(model, batch_size, "torch", compile=True, prepare=False)
        found.append(Way("engine, compiled", name, _in_batches(ours)))
        fast = name if on_gpu else fast
    found.append(_published(model, dense))
    engine = Engine(model, batch_size, "torch")
    found.append(Way("infer", dense, _in_batches(model.infer)))
    found.append(Way("engine", fast, _in_batches(engine)))
    if exits is not None:
        planned = Engine(model, batch_size, "torch", exits=exits)
        found.append(Way("engine, planned exits", fast, _in_batches(planned)))
    if on_gpu:
        ahead = Engine(model, batch_size, "torch", speculate=True)
        found.append(Way("engine, speculative", fast, _in_batches(ahead)))
    found.append(Way("stream", fast, partial(_start_stream, engine), in_batches=False))
    return found


def _in_batches(call: Callable[[Tensor, Replay], Any]) -> Callable[[Tensor, Replay, int], Calls]:
    """A way that answers batch after batch."""

    def start(images: Tensor, policy: Replay, size: int) -> Calls:
        parts = [slice(first, first + size) for first in range(0, len(images), size)]
        return [partial(call, images[part], policy.part(part.start, part.stop)) for part in parts]

    return start


def _published(model: LGViT, like: str) -> Way:
    if model.compute_dtype == torch.float32:
        return Way("published scheme", like, _in_batches(PublishedScheme(model)))
    scheme = PublishedScheme(copy.deepcopy(model).float())
    call = _in_batches(lambda images, policy: scheme(images.float(), policy))
    return Way("published scheme, float32", like, call)


def _start_stream(engine: Engine, images: Tensor, policy: Replay, size: int) -> Calls:
    """A stream over all images; each call takes a batch's worth of answers, the last one the rest."""
    answers = stream(engine, images.split(size), size, order="completion", policy=policy)
    count = -(-len(images) // size)
    return [lambda n=n: list(islice(answers, n)) for n in [size] * (count - 1) + [len(images)]]  # type: ignore[misc]
