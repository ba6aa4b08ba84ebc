"""Rows of a whole model on the recorded traces: dense, eager and compiled, beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from typing import Any

import torch

from benchmarks.gpu_check.devices import Gpu
from benchmarks.gpu_check.record import Known, Measured, Row, ratio
from lgvit_fast.bench.traces import TRACES, Trace
from lgvit_fast.bench.ways import in_torch
from lgvit_fast.clock import Spread
from lgvit_fast.inference import Engine
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Replay

# How much faster than compiled dense, on the trace at 0.8, at the largest batch and at one image.
TARGETS = (1.9, 1.7)
AIMED = TRACES["0.8"]  # whose layer ratio the targets are for
TOLERANCE = 5e-2  # of logits in bfloat16 after all blocks, relative to the largest


def whole_model(gpu: Gpu) -> Iterator[Row]:
    """Milliseconds an image by the host's clock, at each batch size."""
    model = cache(gpu.model)
    for batch in gpu.sizes.batches:
        case = cache(partial(_Case, gpu, model, batch))
        name = f"model/batch {batch}"
        dense = [f"{name}/dense {way}" for way in ("eager", "compiled", "compiled in a graph")]
        yield Row(dense[0], "ms", lambda _, case=case: case().dense("eager"))
        yield Row(dense[1], "ms", lambda _, case=case: case().dense("compiled"))
        yield Row(dense[2], "ms", lambda _, case=case: case().dense("graph"))
        yield Row(f"{name}/best dense", "ms", partial(_best, dense))
        yield from _engine_rows(gpu, case, batch, "engine")
    for batch in gpu.sizes.batches:  # last: each segment is compiled at each batch size it meets
        case = cache(partial(_Case, gpu, model, batch))
        yield from _engine_rows(gpu, case, batch, "engine compiled", compile=True)


def _engine_rows(
    gpu: Gpu, case: Callable[[], _Case], batch: int, title: str, **options: Any
) -> Iterator[Row]:
    """An engine on both traces, beside the dense model of the rows before."""
    name, engine = f"model/batch {batch}", cache(partial(_engine, case, **options))
    for threshold in ("0.9", "0.8"):
        trace = TRACES[threshold]
        ours = f"{name}/{title}, trace {threshold}"
        yield Row(ours, "ms", partial(_ours, case, engine, trace))
        yield ratio(f"{ours} over dense eager", ours, f"{name}/dense eager")
        target = _target(batch, gpu.sizes.batches, trace)
        yield ratio(f"{ours} over best dense", ours, f"{name}/best dense", target)
    if not options:
        yield Row(f"{name}/waits an exit", "waits", partial(_waits, case, engine))


def other_ways(gpu: Gpu, batch: int) -> Iterator[Row]:
    """Ways without a target: speculation, `infer` and the stream."""
    case = cache(partial(_Case, gpu, cache(gpu.model), batch))
    trace = TRACES["0.9"]
    speculative = cache(partial(_engine, case, speculate=True))
    name = f"model/batch {batch}"
    yield Row(
        f"{name}/engine speculative, trace 0.9", "ms", partial(_ours, case, speculative, trace)
    )
    for way in ("infer", "stream"):
        work = partial(_in_torch, case, way, trace)
        yield Row(f"{name}/{way}, trace 0.9", "ms", work)


def _target(batch: int, batches: tuple[int, ...], trace: Trace) -> float | None:
    """Scaled to the trace: the share of the layer ratio that is kept shall be the same."""
    targets = {max(batches): TARGETS[0], min(batches): TARGETS[1]}
    return targets[batch] * trace.layer_ratio / AIMED.layer_ratio if batch in targets else None


def _best(names: list[str], known: Known) -> Measured:
    """The fastest of the dense ways, all of which must have been measured."""
    best = min(names, key=lambda name: known[name])
    return Measured(known[best], facts={"way": best})


class _Case:
    """The model and the images of a pass, in batches."""

    def __init__(self, gpu: Gpu, model: Callable[[], LGViT], batch: int) -> None:
        gpu.tidy()
        self.gpu, self.model, self.batch = gpu, model(), batch
        self.count = -(-max(batch, gpu.sizes.images) // batch) * batch
        shape = (self.count, 3, gpu.sizes.image, gpu.sizes.image)
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randn(shape, generator=draw).to(gpu.device, gpu.dtype)
        self.parts = self.images.split(batch)

    def time(self, run: Callable[[], Any], **more: Any) -> Measured:
        """Milliseconds an image of a pass over all images."""
        spread = self.gpu.passes(run)
        scaled = (1000 * value / self.count for value in (spread.median, spread.low, spread.high))
        return Measured.of(Spread(*scaled), **more)

    @torch.no_grad()
    def dense(self, way: str) -> Measured:
        """Every image to the end, without exit heads."""
        call: Callable[[Any], Any] = self.model.backbone if way == "eager" else self.compiled
        if way == "graph":
            buffer = self.parts[0].clone()
            replay = self.gpu.capture(lambda: self.compiled(buffer))

            def call(images: Any) -> None:
                buffer.copy_(images)
                replay()

        return self.time(lambda: [call(part) for part in self.parts])

    @cached_property
    def compiled(self) -> Callable[[Any], Any]:
        torch.compiler.reset()  # of other batch sizes, which would make this one dynamic
        return torch.compile(self.model.backbone, dynamic=False)

    def script(self, trace: Trace) -> list[tuple[Any, Replay]]:
        """The batches and what scripts each."""
        policy = trace.policy(self.count, [spec.layer for spec in self.model.exits])
        starts = range(0, self.count, self.batch)
        return [
            (part, policy.part(start, start + self.batch))
            for start, part in zip(starts, self.parts, strict=True)
        ]


def _engine(case: Callable[[], _Case], **options: Any) -> Engine:
    made = case()
    torch.compiler.reset()
    return Engine(made.model, made.batch, "torch", graphs=made.gpu.graphs, **options)


def _ours(
    case: Callable[[], _Case], engine: Callable[[], Engine], trace: Trace, _: Known
) -> Measured:
    """An engine's time, once its answers are found to be those of `infer`."""
    made, ours = case(), engine()
    script = made.script(trace)
    images, policy = script[0]
    found, expected = ours(images, policy), made.model.infer(images, policy)
    if not torch.equal(found.exit_index, expected.exit_index):
        raise AssertionError("images leave elsewhere than with infer: it is not timed")
    difference = (found.logits - expected.logits).abs().max() / expected.logits.abs().max()
    if not difference <= TOLERANCE:
        raise AssertionError(f"logits are {difference:.1e} from those of infer: it is not timed")
    report = ours.report()
    facts = {
        "graphs": report.graphs,
        "graph_mib": round(report.graph_bytes / 2**20),
        "trace": trace.name,
        "accuracy": trace.accuracy,
        "dense_accuracy": trace.dense_accuracy,
        "layer_ratio": trace.layer_ratio,
        "difference": float(difference),
    }
    return made.time(lambda: [ours(images, policy) for images, policy in script], facts=facts)


def _waits(case: Callable[[], _Case], engine: Callable[[], Engine], _: Known) -> Measured:
    """How often the host waits, for each exit that was asked: at most once."""
    made, ours = case(), engine()
    script = made.script(TRACES["0.9"])
    before = [ours(images, policy) for images, policy in script]  # captures what is not yet
    waits = made.gpu.waits(lambda: [ours(images, policy) for images, policy in script])
    exits = len(made.model.exits)
    asked = sum(min(exits, 1 + int(answer.exit_index.max())) for answer in before)
    return Measured(waits / asked, target=1.0)


def _in_torch(case: Callable[[], _Case], way: str, trace: Trace, _: Known) -> Measured:
    made = case()
    start = in_torch(way, made.model, made.batch)
    policy = trace.policy(made.count, [spec.layer for spec in made.model.exits])

    @torch.no_grad()
    def run() -> None:
        for call in start(made.images, policy, made.batch):
            call()

    return made.time(run, facts={"trace": trace.name, "accuracy": trace.accuracy})
