"""`lgvit-fast bench model`: what early exit gains by the clock, every way beside every other.

A recorded trace says where each image leaves, so that the weights do not matter. All ways run the same
images in one process and take turns in every round; a ratio is the median over rounds of ratios within
a round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.evaluation.machine import machine
from lgvit_fast.evaluation.published_scheme import PublishedScheme
from lgvit_fast.evaluation.timing import synchronize
from lgvit_fast.evaluation.trace import REAL_TRACE, Trace
from lgvit_fast.inference import Engine, stream
from lgvit_fast.inference.prepared import prepared_twin
from lgvit_fast.model import LGViT, create_model
from lgvit_fast.policies import Replay
from lgvit_fast.weights import save_json

__all__ = ["Row", "Way", "bench_model", "configure", "markdown", "run", "ways"]

Job = Callable[[Tensor, Replay, int], None]


@dataclass(frozen=True)
class Way:
    """One way to answer images.

    Attributes:
        name: in tables.
        like: the dense way that has the same linear layers and compiler, to measure the share of the
            layer ratio that is realised; its own name for a dense way.
        call: answers one batch.
        whole: answers all images at once, in batches of a given size; None calls `call` on each.
    """

    name: str
    like: str
    call: Callable[[Tensor, Replay], Any] | None = None
    whole: Job | None = None


@dataclass(frozen=True)
class Row:
    """What one way did at one batch size.

    Attributes:
        way: its name.
        batch_size: images a call (or a segment waits for, in a stream).
        ms_per_image: median over rounds.
        images_per_second: the inverse.
        speedup: over eager dense timm.
        like: the dense way of the same kind.
        layer_ratio: depth / mean exit layer of these images; 1 for a dense way.
        realised_share: speed-up over `like` / layer ratio; 1 for a dense way.
        spread: lowest and highest `speedup` of a round.
        p50_ms: of a call; None for a stream.
        p99_ms: likewise.
        working_mib: most memory held at once beyond the weights, in a pass over all images.
    """

    way: str
    batch_size: int
    ms_per_image: float
    images_per_second: float
    speedup: float
    like: str
    layer_ratio: float
    realised_share: float
    spread: tuple[float, float]
    p50_ms: float | None
    p99_ms: float | None
    working_mib: float


def ways(model: LGViT, batch_size: int, compiled: bool = True) -> list[Way]:
    """All ways that exist on the model's device, `compiled` ones if asked.

    The first is dense timm, eager. The published scheme is there at batch size 1, the only one it has.
    """
    dense = "dense timm"
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    engine = Engine(model, batch_size)
    found = [Way(dense, dense, lambda x, _: model.backbone(x))]
    fast = dense
    if not on_gpu:
        fast = "dense, prepared linears"
        twin = prepared_twin(model.backbone)
        found.append(Way(fast, fast, lambda x, _: twin(x)))
    if compiled:
        dense_compiled = torch.compile(model.backbone)
        name = "dense timm, compiled"
        found.append(Way(name, name, lambda x, _: dense_compiled(x)))
        fused = Engine(model, batch_size, compile=True, prepare=False)
        found.append(Way("engine, compiled", name, fused))
        fast = name if on_gpu else fast
    if batch_size == 1:
        found.append(Way("published scheme", dense, PublishedScheme(model)))
    found.append(Way("infer", dense, model.infer))
    found.append(Way("engine", fast, engine))
    if on_gpu:
        ahead = Engine(model, batch_size, speculate=True)
        found.append(Way("engine, speculative", fast, ahead))

    def run_stream(images: Tensor, policy: Replay, size: int) -> None:
        for _ in stream(engine, images.split(size), size, order="completion", policy=policy):
            pass

    found.append(Way("stream", fast, whole=run_stream))
    return found


@torch.no_grad()
def bench_model(
    model: LGViT,
    images: Tensor,
    policy: Replay,
    batch_size: int,
    chosen: Sequence[Way],
    rounds: int = 3,
) -> list[Row]:
    """Measure ways on the same images; the first way is the one others are compared with.

    Args:
        model: in eval mode.
        images: `[n, channels, height, width]` on the model's device.
        policy: scripts the n exits.
        batch_size: images a call.
        chosen: from `ways`; each way's `like` must be among them.
        rounds: timed passes of each, after one to warm up.
    """
    device = images.device
    work = {way.name: _calls(way, images, policy, batch_size) for way in chosen}
    peaks = {}
    for name, calls in work.items():  # warm up: compile, capture, choose algorithms
        for call in calls:
            call()
        peaks[name] = _peak_mib(calls, device)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    latencies: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds):
        order = list(work.items())
        for name, calls in order if turn % 2 else reversed(order):
            times = [_clock(call, device) for call in calls]
            seconds[name].append(sum(times))
            latencies[name] += times
    base = np.array(seconds[chosen[0].name])
    layer_ratio = _layer_ratio(model, policy)
    rows = []
    for way in chosen:
        own = np.array(seconds[way.name])
        ratio = 1.0 if way.like == way.name else layer_ratio
        per_image = float(np.median(own)) / len(images)
        calls_ms = None if way.call is None else np.array(latencies[way.name]) * 1000
        rows.append(
            Row(
                way=way.name,
                batch_size=batch_size,
                ms_per_image=1000 * per_image,
                images_per_second=1 / per_image,
                speedup=float(np.median(base / own)),
                like=way.like,
                layer_ratio=ratio,
                realised_share=float(np.median(np.array(seconds[way.like]) / own)) / ratio,
                spread=(float((base / own).min()), float((base / own).max())),
                p50_ms=None if calls_ms is None else float(np.percentile(calls_ms, 50)),
                p99_ms=None if calls_ms is None else float(np.percentile(calls_ms, 99)),
                working_mib=peaks[way.name],
            )
        )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| batch | way | ms/image | images/s | speed-up | layer ratio | realised | p50 ms | p99 ms"
        " | working MiB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        dense = row.way == row.like
        cells = [
            str(row.batch_size),
            row.way,
            f"{row.ms_per_image:.2f}",
            f"{row.images_per_second:.2f}",
            f"{row.speedup:.2f}x",
            "" if dense else f"{row.layer_ratio:.2f}x",
            "" if dense else f"{row.realised_share:.3f}",
            "" if row.p50_ms is None else f"{row.p50_ms:.1f}",
            "" if row.p99_ms is None else f"{row.p99_ms:.1f}",
            f"{row.working_mib:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--model", default="vit_base_patch16_224", metavar="NAME", help="timm name (ViT-B/16)"
    )
    parser.add_argument(
        "--batch-size", type=int, nargs="+", metavar="B", help="default: 1 8 16 32; GPU 1 16 64 256"
    )
    parser.add_argument(
        "--trace", metavar="JSON", help="where images leave: layers and images (default: recorded)"
    )
    parser.add_argument("--images", type=int, default=64, metavar="N", help="a round (64)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed passes (3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="names of ways as in the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")


def run(args: argparse.Namespace) -> int:
    """The command: prints a table, returns the exit code."""
    trace = Trace.load(args.trace) if args.trace else REAL_TRACE
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = create_model(args.model, exits=trace.layers[:-1], num_classes=100)
    model = model.to(device, dtype).eval()
    if model.num_blocks != trace.layers[-1]:
        raise ValueError(
            f"the trace {trace.name!r} is of a model with {trace.layers[-1]} blocks,"
            f" {args.model} has {model.num_blocks}"
        )
    size = cast(tuple[int, int, int], model.pretrained_cfg["input_size"])
    sizes = args.batch_size or ([1, 16, 64, 256] if device.type == "cuda" else [1, 8, 16, 32])
    rows: list[Row] = []
    for batch_size in sizes:
        count = max(args.images, batch_size)
        images = torch.randn(count, *size, device=device, dtype=dtype)
        policy = trace.policy(count, [spec.layer for spec in model.exits])
        chosen = ways(model, batch_size, compiled=not args.no_compile)
        if args.only:
            kept = {chosen[0].name, *args.only}
            kept |= {way.like for way in chosen if way.name in kept}
            chosen = [way for way in chosen if way.name in kept]
        rows += bench_model(model, images, policy, batch_size, chosen, args.rounds)
        torch.compiler.reset()
    print(f"{args.model}, {args.dtype}, {device}, trace: {trace.name}")
    print(markdown(rows))
    if args.json is not None:
        save_json(
            args.json,
            {
                "model": args.model,
                "dtype": args.dtype,
                "trace": asdict(trace),
                "images": args.images,
                "rounds": args.rounds,
                "command": " ".join(sys.argv[1:]),
                "commit": _commit(),
                "machine": machine(),
                "rows": [asdict(row) for row in rows],
            },
        )
    return 0


def _calls(way: Way, images: Tensor, policy: Replay, size: int) -> list[Callable[[], Any]]:
    """A pass over all images as calls to be timed one by one."""
    if way.whole is not None:
        whole = way.whole
        return [partial(whole, images, policy, size)]
    call = way.call
    assert call is not None
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    return [partial(call, images[part], policy.part(part.start, part.stop)) for part in parts]


def _layer_ratio(model: LGViT, policy: Replay) -> float:
    layers = [*(spec.layer for spec in model.exits), model.num_blocks]
    left = [layers[min(i, len(layers) - 1)] for i in policy.exit_index.tolist()]
    return model.num_blocks * len(left) / sum(left)


def _clock(work: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _peak_mib(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Most memory that torch held at once during the calls, beyond what it held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for call in calls:
            call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty where there is no GPU
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for call in calls[:2]:
            call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return float(np.cumsum([0, *(size for _, size in changes)]).max()) / 2**20


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
