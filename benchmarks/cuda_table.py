"""Compiles the CUDA kernels for six architectures and tabulates what ptxas says that they need.

No GPU is asked for, but nvcc is (CUDA_HOME, or on PATH).

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
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "stable" / "cuda"
DOCS = ROOT / "docs" / "kernels.md"
MARKS = ("<!-- table: benchmarks/cuda_table.py -->\n", "<!-- end of CUDA table -->\n")

ARCHS = (80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # of a multiprocessor, on all of them
NAMES = {
    "compact_kernelE": "compact_",
    "end_exit_kernelILb0E": "end_exit_, in place",
    "end_exit_kernelILb1E": "end_exit_, into another buffer",
}


class Use(NamedTuple):
    """What one kernel needs on one architecture."""

    kernel: str
    arch: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block


def parse(report: str, arch: int) -> list[Use]:
    """The kernels in what `ptxas -v` says."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers.*?(\d+) bytes smem"
    )
    found = []
    for symbol, stores, loads, registers, shared in re.findall(pattern, report, re.DOTALL):
        name = next(name for part, name in NAMES.items() if part in symbol)
        spilled = int(stores) + int(loads)
        found.append(Use(name, arch, int(registers), spilled, int(shared)))
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
        found += parse(done.stderr + done.stdout, arch)
    return found


def constant(name: str) -> int:
    """A constant of plan.h."""
    found = re.search(rf"constexpr int {name} = (\d+);", (KERNELS / "plan.h").read_text())
    assert found is not None, name
    return int(found[1])


def violations(uses: list[Use]) -> list[str]:
    """What is beyond the budget, in words."""
    most = REGISTERS // (constant("kThreads") * constant("kBlocksPerMultiprocessor"))
    found = []
    for use in uses:
        if use.spilled:
            found.append(f"{use.kernel} on sm_{use.arch}: {use.spilled} bytes of registers spill")
        if use.registers > most:
            found.append(f"{use.kernel} on sm_{use.arch}: {use.registers} registers, budget {most}")
    return found


def markdown(uses: list[Use]) -> str:
    """The table, a line a kernel and a column an architecture."""
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |"]
    lines.append("|---" * (len(ARCHS) + 1) + "|")
    for kernel in NAMES.values():
        cells = {
            u.arch: f"{u.registers} / {u.spilled} / {u.shared:,} B"
            for u in uses
            if u.kernel == kernel
        }
        lines.append(f"| {kernel} | " + " | ".join(cells[arch] for arch in ARCHS) + " |")
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
