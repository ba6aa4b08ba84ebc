"""The ways to answer images that are measured beside each other: dense, published, and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgvit_fast.bench.published_scheme import PublishedScheme
from lgvit_fast.deploy import Deployed
from lgvit_fast.deploy.dense import TITLES, load_dense, why_not
from lgvit_fast.inference import Engine, stream
from lgvit_fast.inference.prepared import prepared_twin
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Replay

__all__ = ["LeftOut", "Start", "Subject", "Way", "in_torch", "start_of", "ways"]

Calls = list[Callable[[], Any]]
# Images `[n, C, H, W]`, the policy that scripts them and a batch size to a pass over the images, as
# calls to be made, and timed, one by one.
Start = Callable[[Tensor, Replay, int], Calls]

DENSE = "dense timm"
PREPARED = "dense, prepared linears"
COMPILED = "dense timm, compiled"
PLANNED = "engine, planned exits"


@dataclass(frozen=True)
class Way:
    """One way to answer images.

    Attributes:
        name: in tables.
        like: the dense way on the same runtime or with the same linear layers and compiler, to measure
            the share of the layer ratio that is realised; its own name for a dense way.
        precision: of the matrices.
        runtime: what runs the exported model; empty for PyTorch.
        in_batches: whether each call answers one batch; a stream's calls answer what is ready.
    """

    name: str
    like: str
    precision: str = "float32"
    runtime: str = ""
    in_batches: bool = True

    @property
    def dense(self) -> bool:
        """Whether every image runs to the end, without exit heads."""
        return self.name == self.like

    @property
    def exported(self) -> bool:
        """Whether it runs what `lgvit_fast.export` wrote."""
        return bool(self.runtime) and not self.dense and not self.name.startswith(PLANNED)


class LeftOut(NamedTuple):
    """A way that cannot be measured, and why."""

    way: str
    reason: str


@dataclass(frozen=True)
class Subject:
    """What the ways run.

    Attributes:
        model: folder of a saved `LGViT`.
        device: "cpu", "cuda", ...; of the ways in PyTorch.
        dtype: of the ways in PyTorch.
        exits: blocks after which the ways with planned exits ask.
        dense: graphs of the backbone alone, by precision and runtime.
        exported: folders of `lgvit_fast.export`, by precision.
    """

    model: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    exits: tuple[int, ...] | None = None
    dense: Mapping[tuple[str, str], str] = field(default_factory=dict)
    exported: Mapping[str, str] = field(default_factory=dict)


def ways(
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    compiled: bool = True,
    planned: bool = False,
    precisions: Sequence[str] = ("float32",),
) -> tuple[list[Way], list[LeftOut]]:
    """All ways that exist here, and those that are missing; the first is dense timm, eager.

    The published scheme takes the images of a batch one by one, as it must, and in float32, as it is
    published, whatever the dtype. Planned exits are compared with the layer ratio of all exits.

    Args:
        device: of the ways in PyTorch.
        dtype: likewise.
        compiled: with `torch.compile`.
        planned: with engines that ask only the exits of a plan.
        precisions: of the runtimes.
    """
    on_gpu = torch.device(device).type == "cuda"
    precision = str(dtype).removeprefix("torch.")
    in_torch = partial(Way, precision=precision)
    found, left_out = [in_torch(DENSE, DENSE)], []
    fast = DENSE
    if not on_gpu:
        fast = PREPARED
        found.append(in_torch(fast, fast))
    if compiled:
        found += [in_torch(COMPILED, COMPILED), in_torch("engine, compiled", COMPILED)]
        fast = COMPILED if on_gpu else fast
    published = "published scheme" + (", float32" if dtype != torch.float32 else "")
    found.append(Way(published, DENSE))
    found += [in_torch("infer", DENSE), in_torch("engine", fast)]
    if planned:
        found.append(in_torch(PLANNED, fast))
    if on_gpu:
        found.append(in_torch("engine, speculative", fast))
    found.append(in_torch("stream", fast, in_batches=False))
    for precision in precisions:
        for runtime, title in TITLES.items():
            name = title + (f", {precision}" if precision != "float32" else "")
            reason = why_not(runtime, precision)
            if on_gpu:
                reason = f"it runs on the CPU, these are figures of {device}"
            if reason is None:
                dense = f"dense, {name}"
                found.append(Way(dense, dense, precision, runtime))
                found.append(Way(f"deployed, {name}", dense, precision, runtime))
                if planned and precision == "float32":
                    found.append(Way(f"{PLANNED}, {name}", dense, precision, runtime))
            else:
                left_out.append(LeftOut(name, reason))
    return found, left_out


def start_of(way: Way, subject: Subject, batch_size: int) -> Start:
    """What begins a pass over images on a way, for batches of up to `batch_size`."""
    if way.runtime:
        threads = torch.get_num_threads()
        if way.dense:
            run = load_dense(subject.dense[way.precision, way.runtime], way.runtime, threads)
            return _in_batches(lambda images, _: run(images.numpy()))
        if not way.exported:
            planned = LGViT.from_pretrained(subject.model).eval()
            return _in_batches(Engine(planned, batch_size, way.runtime, exits=subject.exits))
        deployed = Deployed(subject.exported[way.precision], way.runtime, threads)
        return _in_batches(lambda images, policy: deployed(images.numpy(), policy))
    model = LGViT.from_pretrained(subject.model).to(subject.device, subject.dtype).eval()
    return in_torch(way.name, model, batch_size, subject.exits)


def in_torch(name: str, model: LGViT, batch_size: int, exits: Sequence[int] | None = None) -> Start:
    """`start_of` for a way in PyTorch, by its name, and a model that is at hand."""
    starts: dict[str, Callable[[], Start]] = {
        DENSE: lambda: _dense(model.backbone),
        PREPARED: lambda: _dense(prepared_twin(model.backbone)),
        COMPILED: lambda: _dense(torch.compile(model.backbone)),
        "engine, compiled": lambda: _in_batches(
            Engine(model, batch_size, "torch", compile=True, prepare=False)
        ),
        "published scheme": lambda: _in_batches(PublishedScheme(model)),
        "published scheme, float32": lambda: _published_float32(model),
        "infer": lambda: _in_batches(model.infer),
        "engine": lambda: _in_batches(Engine(model, batch_size, "torch")),
        PLANNED: lambda: _in_batches(Engine(model, batch_size, "torch", exits=exits)),
        "engine, speculative": lambda: _in_batches(
            Engine(model, batch_size, "torch", speculate=True)
        ),
        # A pass is a stream of its own, too short for captures to be worth their time.
        "stream": lambda: partial(_start_stream, Engine(model, batch_size, "torch", graphs=False)),
    }
    return starts[name]()


def _in_batches(call: Callable[[Tensor, Replay], Any]) -> Start:
    """A way that answers batch after batch."""

    def start(images: Tensor, policy: Replay, size: int) -> Calls:
        parts = [slice(first, first + size) for first in range(0, len(images), size)]
        return [partial(call, images[part], policy.part(part.start, part.stop)) for part in parts]

    return start


def _dense(model: Callable[[Tensor], Any]) -> Start:
    return _in_batches(lambda images, _: model(images))


def _published_float32(model: LGViT) -> Start:
    scheme = PublishedScheme(copy.deepcopy(model).float())
    return _in_batches(lambda images, policy: scheme(images.float(), policy))


def _start_stream(engine: Engine, images: Tensor, policy: Replay, size: int) -> Calls:
    """A stream over all images; each call takes a batch's worth of answers, the last one the rest."""
    answers = stream(engine, images.split(size), size, order="completion", policy=policy)
    count = -(-len(images) // size)
    return [lambda n=n: list(islice(answers, n)) for n in [size] * (count - 1) + [len(images)]]  # type: ignore[misc]
