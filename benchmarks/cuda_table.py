"""Compiles the CUDA kernels for six architectures and tabulates what their machine code needs.

No GPU is asked for, but nvcc is (CUDA_HOME, or on PATH), and Triton, whose package has a disassembler.

    python -m benchmarks.cuda_table            print the table; exit 1 if a kernel is beyond its budget
    python -m benchmarks.cuda_table --write    rewrite the table in docs/kernels.md too

The budget: nothing spills, and the blocks that the launchers count on fit a multiprocessor's registers.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import sass

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "stable" / "cuda"
DOCS = ROOT / "docs" / "kernels.md"
MARKS = ("<!-- table: benchmarks/cuda_table.py -->\n", "<!-- end of CUDA table -->\n")

ARCHS = (80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # of a multiprocessor, on all of them


class Kernel(NamedTuple):
    """One kernel of the table.

    Attributes:
        name: in the table.
        symbol: pattern of its mangled name.
        threads: of a block.
        blocks: of a multiprocessor, that its launcher counts on.
        rate: how to read the instructions an element.
    """

    name: str
    symbol: str
    threads: int
    blocks: int
    rate: sass.Rate


def constant(name: str, file: str) -> int:
    """A constant of a source file."""
    found = re.search(rf"constexpr int {name} = (\d+);", (KERNELS / file).read_text())
    assert found is not None, name
    return int(found[1])


def kernels() -> list[Kernel]:
    """All of csrc/stable/cuda; of lph_tail, those for channels that are read in pairs."""
    plan = (constant("kThreads", "plan.h"), constant("kBlocksPerMultiprocessor", "plan.h"))
    moves = {
        "compact_": "compact_kernelE",
        "end_exit_, in place": "end_exit_kernelILb0E",
        "end_exit_, into another buffer": "end_exit_kernelILb1E",
    }
    found = [Kernel(name, symbol, *plan, lambda code: None) for name, symbol in moves.items()]
    tail = partial(constant, file="lph_tail_kernel.cu")
    sizes = (32 * tail("kMaxWarps"), tail("kBlocks"))
    row, strip = tail("kWholeRow"), tail("kStrip")
    for type_, dtype, size in (
        ("Bfloat16", "bf16", 2),
        ("Float16", "fp16", 2),
        ("Float32", "fp32", 4),
    ):
        # Loads of an element: x and what follows its GEMM, the latter beyond a strip to both sides too.
        ways = {
            f"full, {row} columns": (rf"full_kernel.*{type_}ELi{row}ELb1ELb1E", 2),
            f"full, strips of {strip}": (
                rf"full_kernel.*{type_}ELi{strip}ELb0ELb1E",
                2 + 2 / strip,
            ),
            "light": (rf"light_kernel.*{type_}ELb1E", 2),
        }
        for way, (symbol, times) in ways.items():
            name = f"lph_tail: {way}, {dtype}"
            found.append(Kernel(name, symbol, *sizes, sass.by_loads(times, size)))
    return found


class Use(NamedTuple):
    """What one kernel needs on one architecture."""

    kernel: str
    arch: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block
    instructions: float | None = None  # issued for an element, by a thread


def parse(report: str, arch: int, codes: dict[str, sass.Code]) -> list[Use]:
    """The kernels in what `ptxas -v` says, and in their machine code."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers.*?(\d+) bytes smem"
    )
    found = []
    for symbol, stores, loads, registers, shared in re.findall(pattern, report, re.DOTALL):
        for kernel in kernels():
            if re.search(kernel.symbol, symbol):
                spilled = int(stores) + int(loads)
                use = Use(kernel.name, arch, int(registers), spilled, int(shared))
                rate = kernel.rate(codes[symbol]) if symbol in codes else None
                found.append(use._replace(instructions=rate))
    return found


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return str(Path(home, "bin", "nvcc")) if home else "nvcc"


def compile_for(arch: int) -> list[Use]:
    """Compile every kernel for one architecture."""
    found = []
    for source in sorted(KERNELS.glob("*.cu")):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            command = [nvcc(), "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
            command += ["-o", cubin.name, str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            codes = sass.disassemble(Path(cubin.name))
        found += parse(done.stderr + done.stdout, arch, codes)
    return found


def violations(uses: list[Use]) -> list[str]:
    """What is beyond the budget, in words."""
    budgets = {k.name: REGISTERS // (k.threads * k.blocks) // 8 * 8 for k in kernels()}
    found = []
    for use in uses:
        most = budgets[use.kernel]
        if use.spilled:
            found.append(f"{use.kernel} on sm_{use.arch}: {use.spilled} bytes of registers spill")
        if use.registers > most:
            found.append(f"{use.kernel} on sm_{use.arch}: {use.registers} registers, budget {most}")
    return found


def markdown(uses: list[Use]) -> str:
    """The table, a line a kernel and a column an architecture."""
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |"]
    lines.append("|---" * (len(ARCHS) + 1) + "|")
    for kernel in kernels():
        cells = {
            u.arch: f"{u.registers} / {u.spilled} / {u.shared:,} B / "
            + ("-" if u.instructions is None else f"{u.instructions:.0f}")
            for u in uses
            if u.kernel == kernel.name
        }
        lines.append(f"| {kernel.name} | " + " | ".join(cells[arch] for arch in ARCHS) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the table in the docs")
    options = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        uses = [use for found in pool.map(compile_for, ARCHS) for use in found]
    print(markdown(uses))
    beyond = violations(uses)
    print("\n".join(beyond) or f"{len(uses)} kernels within the budget")
    if options.write and not beyond:
        before, rest = DOCS.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        DOCS.write_text(before + MARKS[0] + markdown(uses) + MARKS[1] + after)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
