"""One command for a machine with a GPU: test what only a GPU can show, then measure it.

    make gpu-check          (or: python -m benchmarks.gpu_check)

Writes one json to benchmarks/results/, named after the GPU. Parts run in this order until the time is
up; each is told apart as done, failed or skipped with its reason, and no part that failed its numerics
is timed. Exit code 0 only if nothing failed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgvit_fast import _extension, ops
from lgvit_fast.heads import ExitHead, ExitSpec
from lgvit_fast.machine import machine
from lgvit_fast.ops.exit_step import ExitRule, RuleKind

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADS = ("lph_full", "lph_light", "gah_2", "gah_3")
RULE = ExitRule(RuleKind.CONFIDENCE, 0.8)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


class Skipped(Exception):
    """A part cannot run here; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are ViT-B/16 at 224 pixels."""

    batches: tuple[int, ...] = (1, 16, 64, 256)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    width: int = 768
    grid: tuple[int, int] = (14, 14)
    num_classes: int = 100
    gemm: int = 8192


@dataclass
class Check:
    """A run in progress: the device, the clock, and what has been found."""

    device: torch.device
    seconds: float
    sizes: Sizes = field(default_factory=Sizes)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def time(self, call: Callable[[], Any]) -> dict[str, float]:
        """Median and 20th and 80th percentile in microseconds, caches flushed between calls."""
        if self.device.type == "cuda":
            from triton.testing import do_bench

            low, mid, high = do_bench(call, warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8])
            return {"p20": low * 1e3, "p50": mid * 1e3, "p80": high * 1e3}
        laps = []
        for _ in range(6):
            begin = time.perf_counter()
            call()
            laps.append((time.perf_counter() - begin) * 1e6)
        laps = sorted(laps[1:])
        return {"p20": laps[0], "p50": laps[2], "p80": laps[4]}


def tests(check: Check) -> dict[str, Any]:
    """The tests marked `gpu`."""
    limit = max(30.0, min(240.0, check.left / 2))
    call = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    if done.returncode == 5:
        raise Skipped("no test is marked gpu")
    if done.returncode:
        print(done.stdout[-4000:])
        raise AssertionError(summary)
    return {"summary": summary}


def sanitizer(check: Check) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck on the CUDA compaction."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skipped("compute-sanitizer is not on the PATH")
    _needs_cuda_extension(check)
    script = (
        "import torch; from lgvit_fast.ops import compact_\n"
        "for b in (0, 1, 3, 64, 257, 2048):\n"
        "    keep = torch.rand(b, device='cuda') < 0.6\n"
        "    x, i = torch.randn(b, 37, device='cuda'), torch.arange(b, device='cuda')\n"
        "    compact_(x, keep, i, backend='cpp')\n"
    )
    found = {}
    for mode in ("memcheck", "racecheck"):
        call = [tool, "--tool", mode, "--error-exitcode", "7", sys.executable, "-c", script]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=90)
        found[mode] = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        if done.returncode:
            raise AssertionError(f"{mode}: {done.stdout[-1500:]}{done.stderr[-500:]}")
    return found


def rates(check: Check) -> dict[str, Any]:
    """What the device reaches on a copy and on a library GEMM: the floors are made of these."""
    x = torch.empty(2**28 if check.device.type == "cuda" else 2**22, dtype=torch.uint8)
    x = x.to(check.device)
    y = torch.empty_like(x)
    copy = check.time(lambda: y.copy_(x))
    result: dict[str, Any] = {"copy_gb_s": 2 * x.numel() / copy["p50"] / 1e3}
    n = check.sizes.gemm
    for dtype in check.sizes.dtypes:
        a = torch.randn(n, n, device=check.device).to(dtype)
        spent = check.time(partial(torch.matmul, a, a))
        result[f"gemm_tflop_s_{_short(dtype)}"] = 2 * n**3 / spent["p50"] / 1e6
    return result


def compaction(check: Check) -> dict[str, Any]:
    """The CUDA kernel against gathering, its bytes per second beside a plain copy's."""
    _needs_cuda_extension(check)
    run = torch.ops.lgvit_fast.compact_
    rows = []
    tokens_an_image = 1 + check.sizes.grid[0] * check.sizes.grid[1]
    for batch in check.sizes.batches:
        for leaving in (0.1, 0.5, 0.9):
            keep = torch.zeros(batch, dtype=torch.bool, device=check.device)
            keep[torch.randperm(batch)[: round(batch * (1 - leaving))]] = True
            shape = (batch, tokens_an_image, check.sizes.width)
            tokens = torch.randn(shape, device=check.device, dtype=check.sizes.dtypes[0])
            index = torch.arange(batch, device=check.device)
            count = torch.zeros(1, dtype=torch.int64, pin_memory=check.device.type == "cuda")
            survivors = int(keep.sum())
            moved = int(keep[survivors:].sum())
            spent = check.time(partial(run, [tokens, index], keep, count))
            plain = check.time(partial(torch.Tensor.__getitem__, tokens, keep))
            size = 2 * moved * tokens[0].numel() * tokens.itemsize
            rows.append(
                {
                    "batch": batch,
                    "leaving": leaving,
                    "rows_moved": moved,
                    "us": spent,
                    "gather_us": plain,
                    "gb_s": size / spent["p50"] / 1e3,
                }
            )
    return {"rows": rows}


def heads(check: Check) -> dict[str, Any]:
    """Every head: numerics against float64 on NaN-poisoned memory, then times and ratios."""
    floors = rates(check)
    rows = []
    for dtype in check.sizes.dtypes:
        for kind in HEADS:
            for batch in check.sizes.batches:
                if check.left < 60:
                    return {"rates": floors, "rows": rows, "cut_short": f"before {kind} B={batch}"}
                rows.append(_head(check, kind, batch, dtype, floors))
                _print_head(rows[-1])
    return {"rates": floors, "rows": rows}


def _head(
    check: Check, kind: str, batch: int, dtype: torch.dtype, floors: dict[str, Any]
) -> dict[str, Any]:
    sizes = check.sizes
    torch.manual_seed(0)
    head = ExitHead(ExitSpec(1, kind), sizes.width, sizes.num_classes, 1, 1).to(check.device).eval()
    tokens = torch.randn(batch, 1 + sizes.grid[0] * sizes.grid[1], sizes.width, device=check.device)
    with torch.no_grad():
        expected = head.double()(tokens.to(dtype).double(), sizes.grid)[0]
    head, tokens = head.to(dtype), tokens.to(dtype)
    head.prepare(dtype)
    state = torch.tensor([0, -1], dtype=torch.int32, device=check.device).repeat(batch, 1)
    backend = "triton" if check.device.type == "cuda" else "auto"

    def fused() -> Tensor:
        return head.step(tokens, sizes.grid, RULE, state).logits

    with torch.no_grad(), ops.backend(backend):
        poison = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # fresh memory is NaN
        try:
            found = fused().double()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = poison
        error = float((found - expected).abs().max() / expected.abs().max())
        row: dict[str, Any] = {"head": kind, "batch": batch, "dtype": _short(dtype), "error": error}
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"{kind} B={batch} {dtype}: relative error {error:.2e} to float64")
        row["fused_us"] = check.time(fused)
        row["eager_us"] = check.time(lambda: head(tokens, sizes.grid)[0])
        compiled = torch.compile(head.forward)
        row["compiled_us"] = check.time(lambda: compiled(tokens, sizes.grid)[0])
    flops = _gemm_flops(kind, batch, sizes)
    row["floor_us"] = flops / floors[f"gemm_tflop_s_{_short(dtype)}"] / 1e6
    fused_us = row["fused_us"]["p50"]
    row["eager_ratio"] = row["eager_us"]["p50"] / fused_us
    row["compiled_ratio"] = row["compiled_us"]["p50"] / fused_us
    row["floor_ratio"] = fused_us / row["floor_us"]
    return row


def model(check: Check) -> dict[str, Any]:
    """The end-to-end suite on the real trace, through pytest-benchmark."""
    suite = ROOT / "benchmarks" / "test_end_to_end.py"
    if not suite.exists():
        raise Skipped(f"{suite.name} does not exist")
    if check.left < 45:
        raise Skipped(f"only {check.left:.0f} s left")
    out = RESULTS / ".end_to_end.json"
    call = [sys.executable, "-m", "pytest", "--benchmark-only", "-q", str(suite)]
    try:
        done = subprocess.run(
            [*call, f"--benchmark-json={out}"],
            cwd=ROOT, capture_output=True, text=True, timeout=check.left,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(done.stdout[-3000:])
        found = json.loads(out.read_text())["benchmarks"]
    finally:
        out.unlink(missing_ok=True)
    keys = ("name", "group", "params", "extra_info")
    figures = ("median", "iqr", "rounds")
    return {
        "rows": [
            {**{k: row[k] for k in keys}, **{k: row["stats"][k] for k in figures}} for row in found
        ]
    }


PARTS: tuple[Callable[[Check], dict[str, Any]], ...] = (tests, sanitizer, compaction, heads, model)


def run(
    check: Check, parts: tuple[Callable[[Check], dict[str, Any]], ...] = PARTS
) -> dict[str, Any]:
    """Run the parts; a json-ready record of all of them."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    built = _extension.facts()
    record: dict[str, Any] = {
        "machine": machine(),
        "commit": commit or None,
        "extension": built.summary if built else _extension.why_missing(),
        "parts": {},
    }
    for part in parts:
        print(f"--- {part.__name__} ({check.left:.0f} s left)", flush=True)
        begin = time.monotonic()
        entry: dict[str, Any]
        if check.left < 20:
            entry = {"status": "skipped", "reason": "the time is up"}
        else:
            try:
                entry = {"status": "done", **part(check)}
            except Skipped as reason:
                entry = {"status": "skipped", "reason": str(reason)}
            except subprocess.TimeoutExpired as late:
                entry = {"status": "failed", "reason": f"took longer than {late.timeout:.0f} s"}
            except Exception as error:  # one part's failure must not lose the others' figures
                entry = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.monotonic() - begin, 1)
        print(f"    {entry['status']} {entry.get('reason', '')}", flush=True)
        record["parts"][part.__name__] = entry
    return record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="json (default: benchmarks/results/gpu_NAME.json)")
    parser.add_argument(
        "--seconds", type=float, default=480, help="time for all parts (default 480)"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here", file=sys.stderr)
        return 1
    record = run(Check(torch.device("cuda"), options.seconds))
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()).strip("_")
    out = options.out or RESULTS / f"gpu_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    states = {name: entry["status"] for name, entry in record["parts"].items()}
    print(f"wrote {out}: " + ", ".join(f"{name} {state}" for name, state in states.items()))
    return int("failed" in states.values())


def _needs_cuda_extension(check: Check) -> None:
    problem = _extension.why_missing(check.device)
    if problem:
        raise Skipped(problem)


def _gemm_flops(kind: str, batch: int, sizes: Sizes) -> float:
    """Of the full GEMMs that the exact inference form cannot avoid."""
    height, width = sizes.grid
    if kind.startswith("lph"):
        return 2.0 * batch * height * width * sizes.width**2
    stride = int(kind.removeprefix("gah_"))
    tokens = -(-height // stride) * -(-width // stride)
    return 4.0 * batch * tokens * sizes.width**2


def _print_head(row: dict[str, Any]) -> None:
    print(
        f"    {row['head']:9} B={row['batch']:<4} {row['dtype']}  {row['fused_us']['p50']:9.1f} us"
        f"  {row['eager_ratio']:5.2f}x eager  {row['compiled_ratio']:5.2f}x compiled"
        f"  {row['floor_ratio']:5.2f}x floor  error {row['error']:.1e}",
        flush=True,
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


if __name__ == "__main__":
    sys.exit(main())
