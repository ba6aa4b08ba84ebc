"""`lgvit-fast bench model`: what early exit gains by the clock, every way beside every other.

A recorded trace says where each image leaves, so that the weights do not matter. All ways run the same
images in one process and take turns batch by batch, so that a slow moment of the machine hits all; a
ratio is the median over rounds of ratios of a round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lgvit_fast.arguments import UsageError, count
from lgvit_fast.bench.traces import TRACES, Trace
from lgvit_fast.bench.ways import Way, ways
from lgvit_fast.checkpoints.files import save_json, write_atomic
from lgvit_fast.clock import seconds as seconds_of
from lgvit_fast.inference import Plan, plan_exits
from lgvit_fast.machine import machine
from lgvit_fast.model import LGViT, create_model
from lgvit_fast.ops.torch_private import profiled_allocations
from lgvit_fast.policies import Replay

__all__ = ["Row", "bench_model", "configure", "markdown", "plot", "run"]


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
        working_mib: most memory held at once beyond the weights, while answering.
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
    peaks = {}
    for way in chosen:  # warm up: compile, capture, choose algorithms
        for call in way.start(images, policy, batch_size):
            call()
        calls = way.start(images, policy, batch_size)
        peaks[way.name] = _peak_mib(calls[:2] if way.in_batches else calls, device)
    seconds: dict[str, list[float]] = {way.name: [] for way in chosen}
    latencies: dict[str, list[float]] = {way.name: [] for way in chosen}
    for _ in range(rounds):
        passes = [way.start(images, policy, batch_size) for way in chosen]
        times: list[list[float]] = [[] for _ in chosen]
        for turn in range(len(passes[0])):
            for place in range(len(chosen)):
                place = (place + turn) % len(chosen)  # not always after the same way
                times[place].append(seconds_of(passes[place][turn], device))
        for way, own in zip(chosen, times, strict=True):
            seconds[way.name].append(sum(own))
            latencies[way.name] += own
    base = np.array(seconds[chosen[0].name])
    layer_ratio = _layer_ratio(model, policy)
    rows = []
    for way in chosen:
        taken = np.array(seconds[way.name])
        ratio = 1.0 if way.like == way.name else layer_ratio
        per_image = float(np.median(taken)) / len(images)
        calls_ms = np.array(latencies[way.name]) * 1000 if way.in_batches else None
        rows.append(
            Row(
                way=way.name,
                batch_size=batch_size,
                ms_per_image=1000 * per_image,
                images_per_second=1 / per_image,
                speedup=float(np.median(base / taken)),
                like=way.like,
                layer_ratio=ratio,
                realised_share=float(np.median(np.array(seconds[way.like]) / taken)) / ratio,
                spread=(float((base / taken).min()), float((base / taken).max())),
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


def plot(rows: Sequence[Row], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the speed-up of every way over eager dense timm, a panel for each batch size."""
    figure = speedup_figure(rows, title)
    FigureCanvasAgg(figure)
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def speedup_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """What `plot` draws."""
    sizes = sorted({row.batch_size for row in rows})
    figure = Figure(figsize=(7.5, 0.9 + 2.2 * len(sizes)), dpi=150, layout="constrained")
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        shown = [row for row in rows if row.batch_size == size][::-1]
        colours = ["#8a8f98" if row.way == row.like else "#1f77b4" for row in shown]
        bars = axes.barh([row.way for row in shown], [r.speedup for r in shown], color=colours)
        # on white and above the dashed line, which would run through a number
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        numbers = [f"{row.speedup:.2f}x" for row in shown]
        axes.bar_label(bars, numbers, padding=3, fontsize=8, bbox=box, zorder=3)
        ratio = max(row.layer_ratio for row in shown)
        axes.axvline(ratio, color="#d1242f", linewidth=1, linestyle="--", zorder=2)
        axes.set_title(f"batch {size}", loc="left", fontsize=9)
        axes.margins(x=0.15)
    panels[-1].set_xlabel("images/s over eager dense timm (dashed: layer ratio)")
    figure.suptitle(title, fontsize=10)
    return figure


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--model", default="vit_base_patch16_224", metavar="NAME", help="timm name (ViT-B/16)"
    )
    parser.add_argument(
        "--batch-size",
        type=count,
        nargs="+",
        metavar="B",
        help="default: 1 8 16 32; GPU 1 16 64 256",
    )
    parser.add_argument(
        "--trace",
        default="0.9",
        metavar="T|JSON",
        help=f"where images leave: recorded at threshold {', '.join(TRACES)} (0.9), or a json file",
    )
    parser.add_argument("--images", type=count, default=64, metavar="N", help="a round (64)")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="timed passes (3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--plan", action="store_true", help="also plan the exits, and check the plan's prediction"
    )
    parser.add_argument("--only", nargs="+", metavar="WAY", help="names of ways as in the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the speed-ups")


def run(args: argparse.Namespace) -> int:
    """The command: prints a table, returns the exit code."""
    trace = TRACES[args.trace] if args.trace in TRACES else Trace.load(args.trace)
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
    plans: list[dict[str, Any]] = []
    for batch_size in sizes:
        number = max(args.images, batch_size)
        images = torch.randn(number, *size, device=device, dtype=dtype)
        policy = trace.policy(number, [spec.layer for spec in model.exits])
        plan = None
        if args.plan:
            histogram = np.bincount(policy.exit_index, minlength=len(trace.images)).tolist()
            plan = plan_exits(model, histogram, batch_size)
        chosen = ways(model, batch_size, not args.no_compile, None if plan is None else plan.exits)
        if args.only:
            _check_ways(args.only, chosen)
            kept = {chosen[0].name, *args.only} | ({"engine, planned exits"} if plan else set())
            kept |= {way.like for way in chosen if way.name in kept}
            chosen = [way for way in chosen if way.name in kept]
        rows += bench_model(model, images, policy, batch_size, chosen, args.rounds)
        if plan is not None:
            plans.append(_checked(plan, batch_size, rows))
        torch.compiler.reset()
    print(f"{args.model}, {args.dtype}, {device}\ntrace {trace}")
    print(markdown(rows))
    for checked in plans:
        print(
            "batch {batch_size}: planned exits {exits}; predicted {predicted_ms:.2f} ms/image,"
            " measured {measured_ms:.2f}; with all exits predicted {predicted_all_ms:.2f},"
            " measured {measured_all_ms:.2f}".format(**checked)
        )
    if args.png is not None:
        plot(rows, args.png, f"{args.model}, {args.dtype}, {device}")
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
                "plans": plans,
            },
        )
    return 0


def _check_ways(names: Sequence[str], chosen: Sequence[Way]) -> None:
    known = [way.name for way in chosen]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"--only {', '.join(map(repr, unknown))}: expected ways out of {', '.join(known)}"
        )


def _checked(plan: Plan, batch_size: int, rows: Sequence[Row]) -> dict[str, Any]:
    """A plan's predictions beside what was measured."""
    measured = {row.way: row.ms_per_image for row in rows if row.batch_size == batch_size}
    return {
        "batch_size": batch_size,
        "exits": list(plan.exits),
        "predicted_ms": 1000 * plan.seconds,
        "measured_ms": measured["engine, planned exits"],
        "predicted_all_ms": 1000 * plan.seconds_with_all,
        "measured_all_ms": measured.get("engine", float("nan")),
    }


def _layer_ratio(model: LGViT, policy: Replay) -> float:
    layers = [*(spec.layer for spec in model.exits), model.num_blocks]
    left = [layers[min(i, len(layers) - 1)] for i in policy.exit_index.tolist()]
    return float(model.num_blocks * len(left) / sum(left))


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
        for call in calls:
            call()
    sizes = [size for _, size in profiled_allocations(profile)]
    return float(np.cumsum([0, *sizes]).max()) / 2**20


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
