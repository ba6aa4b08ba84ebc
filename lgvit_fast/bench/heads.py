"""`lgvit-fast bench heads`: the fused exits beside the plain ones on the machine at hand.

Plain is the head in training form in eval mode, eager: all tokens through every layer, then the
mean and the classifier. Torch is the exact inference form in plain PyTorch, fused the backend chosen
for this machine; both also decide who leaves. All run on the same tokens in one process and take
turns of two calls: the first finds the caches that the others leave behind, the second is warm.
Times are of warm calls; a ratio is the median over rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from lgvit_fast import ops
from lgvit_fast.arguments import count
from lgvit_fast.checkpoints.files import save_json
from lgvit_fast.clock import take_turns
from lgvit_fast.heads import ExitHead, ExitSpec
from lgvit_fast.machine import machine
from lgvit_fast.ops.exit_step import ExitRule, RuleKind

__all__ = ["HEADS", "Row", "bench_heads", "calls", "configure", "exit_head", "markdown", "run"]

HEADS = ("lph_full", "lph_light", "gah_2", "gah_3")  # each twice: the eight exits of ViT-B
WIDTH, GRID, CLASSES = 768, (14, 14), 100  # ViT-B/16 at 224 pixels
_RULE = ExitRule(RuleKind.CONFIDENCE, 0.8)


@dataclass(frozen=True)
class Row:
    """One head at one batch size and dtype.

    Attributes:
        head: as in `ExitSpec`.
        batch_size: images a call.
        dtype: "float32" or "bfloat16", of both sides.
        plain_ms: a warm call of the training form in eval mode, median over rounds.
        torch_ms: likewise of the exact form in plain PyTorch.
        fused_ms: likewise of the backend chosen here.
        ratio: plain / fused.
        spread: lowest and highest quartile of `ratio` over the rounds.
        first_ratio: as `ratio`, of first calls.
        error: largest difference of the logits to the plain form in float64, relative to the largest.
    """

    head: str
    batch_size: int
    dtype: str
    plain_ms: float
    torch_ms: float
    fused_ms: float
    ratio: float
    spread: tuple[float, float]
    first_ratio: float
    error: float


def exit_head(
    head: str,
    dtype: torch.dtype,
    device: torch.device,
    width: int = WIDTH,
    num_classes: int = CLASSES,
) -> ExitHead:
    """An exit with one class token, in eval mode and prepared; its BatchNorms are no identities."""
    made = ExitHead(ExitSpec(1, head), width, num_classes, 1, 1).to(device, dtype).eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    made.prepare(dtype)
    return made


def calls(
    head: str, batch_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to the logits `[B, K]` of one exit on the same tokens: plain, torch, fused, float64."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch_size, 1 + GRID[0] * GRID[1], WIDTH, generator=draw)
    tokens = tokens.to(device, dtype)
    measured = exit_head(head, dtype, device)
    state = torch.zeros(batch_size, 2, dtype=torch.int32, device=device)

    def step(backend: str) -> torch.Tensor:
        with ops.backend(backend):
            return measured.step(tokens, GRID, _RULE, state).logits

    def exact() -> torch.Tensor:
        measured.double()
        logits: torch.Tensor = measured(tokens.double(), GRID)[0]
        measured.to(dtype)
        return logits

    return {
        "plain": lambda: measured(tokens, GRID)[0],
        "torch": lambda: step("torch"),
        "fused": lambda: step("auto"),
        "float64": exact,
    }


@torch.inference_mode()
def bench_heads(
    batch_size: int, dtype: torch.dtype, device: torch.device, rounds: int = 21
) -> list[Row]:
    """Measure every head of `HEADS`."""
    rows = []
    for head in HEADS:
        work = calls(head, batch_size, dtype, device)
        expected = work.pop("float64")()
        difference = (work["fused"]().double() - expected).abs().max() / expected.abs().max()
        times = take_turns(work, device, rounds, repeats=2)
        first, second = (
            {name: 1000 * taken[:, place] for name, taken in times.items()} for place in (0, 1)
        )
        ratios = second["plain"] / second["fused"]
        low, ratio, high = np.percentile(ratios, (25, 50, 75)).tolist()
        rows.append(
            Row(
                head=head,
                batch_size=batch_size,
                dtype=str(dtype).removeprefix("torch."),
                plain_ms=float(np.median(second["plain"])),
                torch_ms=float(np.median(second["torch"])),
                fused_ms=float(np.median(second["fused"])),
                ratio=ratio,
                spread=(low, high),
                first_ratio=float(np.median(first["plain"] / first["fused"])),
                error=float(difference),
            )
        )
    return rows


@torch.inference_mode()
def dense_ms(batch_size: int, dtype: torch.dtype, device: torch.device, rounds: int = 5) -> float:
    """Milliseconds of a forward pass of dense, eager timm ViT-B/16, median."""
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
    model = model.to(device, dtype).eval()
    images = torch.randn(batch_size, 3, 224, 224, device=device, dtype=dtype)
    times = take_turns({"dense": lambda: model(images)}, device, rounds)
    return 1000 * float(np.median(times["dense"]))


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| head | batch | dtype | plain ms | torch ms | fused ms | ratio | quartiles | first calls |"
        " error |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.head} | {row.batch_size} | {row.dtype} | {row.plain_ms:.2f} |"
            f" {row.torch_ms:.2f} | {row.fused_ms:.2f} | {row.ratio:.2f}x |"
            f" {row.spread[0]:.2f} to {row.spread[1]:.2f} | {row.first_ratio:.2f}x | {row.error:.0e} |"
        )
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--batch-size", type=count, nargs="+", metavar="B", help="default: 1 16; GPU 1 16 64 256"
    )
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=count, default=21, metavar="N", help="timed rounds (21)")
    parser.add_argument("--no-dense", action="store_true", help="leave out dense ViT-B/16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")


def run(args: argparse.Namespace) -> int:
    """The command: prints a table and what eight exits cost; returns the exit code."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    sizes = args.batch_size or ([1, 16, 64, 256] if device.type == "cuda" else [1, 16])
    rows: list[Row] = []
    shares: list[dict[str, Any]] = []
    for name in args.dtype:
        for size in sizes:
            measured = bench_heads(size, getattr(torch, name), device, args.rounds)
            rows += measured
            if not args.no_dense:
                dense = dense_ms(size, getattr(torch, name), device)
                eight = 2 * sum(row.fused_ms for row in measured)
                shares.append(
                    {"batch_size": size, "dtype": name, "dense_ms": dense, "eight_exits_ms": eight}
                )
    print(f"ViT-B/16 sizes, {device}, {torch.get_num_threads()} threads")
    print(markdown(rows))
    for share in shares:
        part = share["eight_exits_ms"] / share["dense_ms"]
        print(
            f"eight exits, batch {share['batch_size']}, {share['dtype']}: {100 * part:.1f}% of"
            f" dense ViT-B/16 ({share['eight_exits_ms']:.1f} of {share['dense_ms']:.0f} ms)"
        )
    if args.json is not None:
        save_json(
            args.json,
            {
                "rounds": args.rounds,
                "command": " ".join(sys.argv[1:]),
                "machine": machine(),
                "rows": [asdict(row) for row in rows],
                "dense": shares,
            },
        )
    return 0
