"""compute-sanitizer over every kernel of the project.

    make gpu-memcheck       (or: python -m benchmarks.gpu_check.memcheck)

Torch's caching of memory is off, so that a byte beyond a tensor is a byte beyond an allocation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lgvit_fast import ops
from lgvit_fast.bench.heads import HEADS, exit_head
from lgvit_fast.exit_rules import ExitRule, ExitStep, RuleKind
from lgvit_fast.ops import compact_
from lgvit_fast.ops.attention import attention
from lgvit_fast.ops.depthwise import depthwise_gelu
from lgvit_fast.ops.end_exit import end_exit_
from lgvit_fast.ops.lph import LPHWeights, gemm_and_tail
from lgvit_fast.outputs import Inference

ROOT = Path(__file__).parents[2]
RULE = ExitRule(RuleKind.PATIENCE, patience=2)


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel at sizes that fill no tile, by name."""
    for batch in (1, 3, 67):
        yield f"compact_, batch {batch}", lambda batch=batch: _compact(batch, device)
        yield f"end_exit_, batch {batch}", lambda batch=batch: _end_exit(batch, device)
    for dtype in (torch.bfloat16, torch.float32):
        for kind in HEADS:
            for grid in ((7, 5), (15, 17)):  # a global head has one tile of tokens, or several
                name = f"{kind}, {grid[0]} x {grid[1]}, {dtype}"
                yield (
                    name,
                    lambda kind=kind, grid=grid, dtype=dtype: _step(kind, grid, dtype, device),
                )
        for grid in ((5, 14), (3, 9)):
            for full in (True, False):
                name = f"lph_tail, {grid[0]} x {grid[1]}, {'full' if full else 'light'}, {dtype}"
                yield name, lambda g=grid, f=full, dtype=dtype: _lph_tail(g, f, dtype, device)
        yield f"attention, {dtype}", lambda dtype=dtype: _attention(dtype, device)
        yield f"depthwise_gelu, {dtype}", lambda dtype=dtype: _depthwise(dtype, device)


def run(device: torch.device) -> None:
    """Make all calls: on a GPU the compiled and the Triton kernels, elsewhere what there is."""
    torch.manual_seed(0)
    with ops.backend("triton" if device.type == "cuda" else "auto"):
        for name, call in calls(device):
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(name, flush=True)


def _compact(batch: int, device: torch.device) -> None:
    keep = torch.rand(batch, device=device) < 0.6
    tokens, index = torch.randn(batch, 37, device=device), torch.arange(batch, device=device)
    compact_(tokens, keep, index, backend="cpp" if device.type == "cuda" else "auto")


def _end_exit(batch: int, device: torch.device) -> None:
    leave = torch.rand(batch, device=device) < 0.4
    step = ExitStep(torch.randn(batch, 7, device=device), leave, torch.ones_like(leave))
    answer = Inference.blank(batch, 7, torch.float32, device).tensors()
    tokens, rows = torch.randn(batch, 37, device=device), torch.arange(batch, device=device)
    state = torch.zeros(batch, 2, dtype=torch.int32, device=device)
    backend = "cpp" if device.type == "cuda" else "auto"
    end_exit_(step, tokens, rows, state, answer, 0, 1, into=tokens.clone(), backend=backend)


@torch.no_grad()
def _step(kind: str, grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    head = exit_head(kind, dtype, device, width=96, num_classes=13)
    tokens = torch.randn(3, 1 + grid[0] * grid[1], 96, device=device).to(dtype)
    state = torch.zeros(3, 2, dtype=torch.int32, device=device)
    head.step(tokens, grid, RULE, state)


@torch.no_grad()
def _lph_tail(grid: tuple[int, int], full: bool, dtype: torch.dtype, device: torch.device) -> None:
    for width in (96, 33):
        vector = torch.randn(width, device=device)
        weights = LPHWeights(torch.randn(width, width, device=device).to(dtype), vector)
        if full:
            taps = torch.randn(width, 3, 3, device=device)
            weights = LPHWeights(*weights[:2], vector, vector, taps, vector)
        tokens = torch.randn(3, 1 + grid[0] * grid[1], width, device=device).to(dtype)
        gemm_and_tail(tokens, grid, 1, weights)


def _attention(dtype: torch.dtype, device: torch.device) -> None:
    qkv = torch.randn(2, 37, 3 * 96, device=device, dtype=dtype, requires_grad=True)
    attention(qkv, 4).sum().backward()


def _depthwise(dtype: torch.dtype, device: torch.device) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    depthwise_gelu(random(2, 35, 96), (7, 5), random(96, 3, 3), random(96)).sum().backward()


def find_tool() -> str | None:
    """compute-sanitizer: of CUDA_HOME, else on PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=f"{home}/bin") or shutil.which(
        "compute-sanitizer"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.memcheck", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--calls", action="store_true", help="make the calls, unchecked, and no more"
    )
    parser.add_argument("--device", default="cuda", help="of --calls (cuda)")
    options = parser.parse_args(arguments)
    if options.calls:
        run(torch.device(options.device))
        return 0
    tool = find_tool()
    if tool is None:
        print(
            "gpu-memcheck: compute-sanitizer is neither in CUDA_HOME nor on PATH; nothing checked"
        )
        return 0
    check = [tool, "--tool", "memcheck", "--error-exitcode", "7"]
    own = [sys.executable, "-m", "benchmarks.gpu_check.memcheck", "--calls"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(check + own, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
