"""Compiles every Triton kernel ahead of time and tabulates what the machine code needs.

No GPU is asked for: launches at ViT-B/16 sizes are recorded on tensors without memory, and each is
compiled as it would be for six architectures, with every configuration that its tuning may pick there,
by whatever Triton is installed.

    python -m benchmarks.kernel_table            print the table; exit 1 if beyond kernel_budget.json
    python -m benchmarks.kernel_table --slice    the first candidate of each, for one architecture
    python -m benchmarks.kernel_table --write    rewrite the budget and the table in docs/kernels.md
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from lgvit_fast.kernels import attention, common, depthwise, exit_step, gah, lph, tuning

ROOT = Path(__file__).parents[1]
BUDGET = ROOT / "benchmarks" / "kernel_budget.json"
DOCS = ROOT / "docs" / "kernels.md"
MARKS = ("<!-- table: benchmarks/kernel_table.py -->\n", "<!-- end of table -->\n")

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program can have
MATRIX = {  # tensor core instructions, by the name they have in machine code
    80: "HMMA",
    86: "HMMA",
    89: "HMMA",
    90: "HGMMA",  # wgmma
    100: "UTCHMMA",  # tcgen05.mma
    120: "HMMA",
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.bool: "i1",
}


class Launch(NamedTuple):
    """One recorded launch."""

    case: str
    kernel: Any  # a JITFunction or an Autotuner around one
    arguments: dict[str, Any]


class Row(NamedTuple):
    """What one candidate of a kernel needs on one architecture."""

    kernel: str
    arch: int
    candidate: str  # the values that tuning chooses
    registers: int  # a thread
    spills: int  # instructions that touch local memory
    shared: int  # bytes a program
    matrix: str  # "HGMMA x 48", or "-"
    instructions: float | None  # issued for an element, by a thread


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def local_head(full: bool, dtype: torch.dtype, images: int = 256) -> None:
    """ViT-B/16 at 224."""
    c = 768
    vector = meta(c, dtype=torch.float32)
    weights = [meta(c, c, dtype=dtype), vector]
    if full:
        weights += [vector, vector, meta(c, 3, 3, dtype=torch.float32), vector]
    lph.lph_pool(meta(images, 197, c, dtype=dtype), (14, 14), 1, *weights)


def global_head(grid: int, stride: int, pool: str, dtype: torch.dtype, images: int = 256) -> None:
    """ViT-B/16."""
    tokens = meta(images, 1 + grid * grid, 768, dtype=dtype)
    weight = meta(2 * 768, 768, dtype=dtype)
    gah.gah_pool(tokens, (grid, grid), 1, weight, 8, stride, pool)


def exit_decision(classes: int, dtype: torch.dtype, vectors: int = 2, images: int = 256) -> None:
    """The patience rule, the one with the most state; after a local head, or `vectors` of a global."""
    pooled = meta(images, vectors, 768, dtype=torch.float32 if vectors == 2 else dtype)
    tokens = meta(images, 197, 768, dtype=dtype)
    weight = meta(classes, (vectors + 1) * 768, dtype=dtype)
    bias = meta(classes, dtype=torch.float32)
    state = meta(images, 2, dtype=torch.int32)
    exit_step.exit_step(pooled, tokens, 1, weight, bias, (3, 0.0, 7), state)


def depthwise_training(dtype: torch.dtype) -> None:
    """Forward and backward, 64 images."""
    u, vectors = meta(64, 196, 768, dtype=dtype), meta(768, dtype=torch.float32)
    taps = meta(768, 3, 3, dtype=torch.float32)
    depthwise.depthwise_gelu(u, (14, 14), taps, vectors)
    depthwise.depthwise_gelu_backward(u, u, (14, 14), taps, vectors)


def attention_training(count: int, dtype: torch.dtype) -> None:
    """Forward and backward, 64 images."""
    qkv = meta(64, count, 3 * 768, dtype=dtype)
    out, lse = attention.attention(qkv, 8)
    attention.attention_backward(out, qkv, out, lse, 8)


BF16, FP32 = torch.bfloat16, torch.float32
CASES: dict[str, Callable[[], object]] = {
    "full, bf16": lambda: local_head(True, BF16),
    "full, bf16, 1 image": lambda: local_head(True, BF16, 1),
    "full, fp32": lambda: local_head(True, FP32),
    "full, fp32, 1 image": lambda: local_head(True, FP32, 1),
    "light, bf16": lambda: local_head(False, BF16),
    "light, fp32": lambda: local_head(False, FP32),
    "light, bf16, 1 image": lambda: local_head(False, BF16, 1),
    "49 tokens, bf16": lambda: global_head(14, 2, "subsample", BF16),
    "49 tokens, bf16, 1 image": lambda: global_head(14, 2, "subsample", BF16, 1),
    "49 tokens, fp32": lambda: global_head(14, 2, "subsample", FP32),
    "49 tokens, fp32, 1 image": lambda: global_head(14, 2, "subsample", FP32, 1),
    "49 averaged, bf16": lambda: global_head(14, 2, "average", BF16),
    "49 averaged, bf16, 1 image": lambda: global_head(14, 2, "average", BF16, 1),
    "576 tokens, bf16": lambda: global_head(24, 1, "subsample", BF16),
    "1000 classes, bf16": lambda: exit_decision(1000, BF16),
    "300 classes, bf16": lambda: exit_decision(300, BF16),
    "21841 classes, bf16": lambda: exit_decision(21841, BF16),
    "1000 classes, bf16, 4096 images": lambda: exit_decision(1000, BF16, images=4096),
    "100 classes, fp32": lambda: exit_decision(100, FP32),
    "100 classes, 8 vectors, bf16": lambda: exit_decision(100, BF16, 8),
    "training, bf16": lambda: (depthwise_training(BF16), attention_training(49, BF16)),
    "training, fp32": lambda: (depthwise_training(FP32), attention_training(49, FP32)),
}
MODULES: tuple[ModuleType, ...] = (lph, gah, exit_step, depthwise, attention)


class Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, case: str, launches: list[Launch]) -> None:
        self.kernel, self.case, self.launches = kernel, case, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(jit(self.kernel).arg_names, args, strict=False)) | kwargs
            self.launches.append(Launch(self.case, self.kernel, arguments))

        return launch


def jit(kernel: Any) -> Any:
    """The JITFunction inside an autotuner."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def label(launch: Launch) -> str:
    """The kernel's name, what it is used for where it has several uses, and the case."""
    name = jit(launch.kernel).__name__.removesuffix("_kernel")
    return f"{name} {launch.arguments.get('USE', '')}".rstrip() + f": {launch.case}"


@contextmanager
def recording(case: str, launches: list[Launch]) -> Iterator[None]:
    """Kernels record their launches, and tensors without memory pass for those of a GPU."""
    kept: list[tuple[ModuleType, str, Any]] = []
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                kept.append((module, name, value))
                setattr(module, name, Recorder(value, case, launches))
    for module in (common, *MODULES):
        if hasattr(module, "check_device"):
            kept.append((module, "check_device", module.check_device))
            setattr(module, "check_device", lambda name, tensor: None)  # noqa: B010
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def record() -> list[Launch]:
    """The launches of all cases; a kernel that two cases compile alike is kept once."""
    launches: list[Launch] = []
    for case, run in CASES.items():
        with recording(case, launches):
            run()
    kept: dict[tuple[Any, ...], Launch] = {}
    for launch in launches:
        constants = [p.name for p in jit(launch.kernel).params if p.is_constexpr]
        dtypes = (v.dtype for v in launch.arguments.values() if isinstance(v, Tensor))
        values = (launch.arguments.get(name) for name in constants)
        kept.setdefault((jit(launch.kernel).__name__, *values, *dtypes), launch)
    return list(kept.values())


def candidates(launch: Launch, arch: int) -> list[dict[str, Any]]:
    """The configurations that a launch may run with on an architecture, the best guess first."""
    if not isinstance(launch.kernel, tuning.Tuned):
        return [{}]
    tuned, device = launch.kernel, tuning.Device(SHARED_LIMIT[arch] * 1024, arch)
    fitting = tuning.fitting(tuned.configs, tuned.fits, device, launch.arguments)
    return [config.all_kwargs() for config in fitting]


def source(
    launch: Launch, arch: int, candidate: dict[str, Any]
) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch: types, constants, alignment and options."""
    arguments = launch.arguments | candidate
    options = {}
    for name in ("num_warps", "num_stages", "num_ctas", "maxnreg"):
        if arguments.get(name) is not None:
            options[name] = arguments[name]
        arguments.pop(name, None)
    function = jit(launch.kernel)
    constants = {p.name for p in function.params if p.is_constexpr}
    general = {p.name for p in function.params if p.do_not_specialize}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(function.arg_names):
        value = arguments[name]
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in constants or value is None or (value == 1 and name not in general):
            signature[name] = "constexpr"
            constexprs[(index,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in general:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constexprs, attributes), options


def rate(launch: Launch, candidate: dict[str, Any]) -> sass.Rate:
    """How to read the instructions an element: of a product's tile, of a walk's loads, of scores.

    Of an exit step an element is the product of a vector of C channels with a class's weights.
    """
    name, a = jit(launch.kernel).__name__.removesuffix("_kernel"), launch.arguments | candidate
    warps, first = a.get("num_warps", 4), next(v for v in a.values() if isinstance(v, Tensor))
    if name.endswith("project"):
        return sass.of_product(a["BLOCK_M"], a["BLOCK_N"], a["C"], warps)
    if "depthwise" in name:  # u in three shifts, and with it a gradient where there is one
        with_gradient = name == "depthwise_taps" or a.get("USE") == "inner"
        return sass.by_loads(4 if with_gradient else 3, first.itemsize)
    if name in ("gah_pool", "attention", "attention_backward"):
        tile = a.get("BLOCK_Q") or a["BLOCK"]
        return sass.by_elements(tile * tile / (32 * warps))
    if name == "lph_sum_pool":
        return sass.by_loads(1, a["x"].itemsize)
    if name == "exit_step":
        vectors, steps = a["M"] + a["T"], triton.cdiv(a["C"], a["BLOCK_C"])
        parts, walks = (vectors, 2) if a["SPLIT"] else (1, vectors)
        products = a["BLOCK_B"] * a["K"] * vectors
        return sass.of_arrivals(products, parts, a["tiles"], walks * steps, warps)
    return lambda code: None


def compile_launch(index: int, arch: int, number: int) -> Row:
    """Compile the index-th launch with one of its candidates and read the machine code."""
    launch = record()[index]
    candidate = candidates(launch, arch)[number]
    code, options = source(launch, arch, candidate)
    compiled = triton.compile(code, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = [str(sass.TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        (machine,) = sass.disassemble(Path(file.name)).values()
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    found = {name: machine.count(name) for name in ("HMMA", MATRIX[arch])}
    return Row(
        kernel=label(launch),
        arch=arch,
        candidate=" ".join(f"{k.removeprefix('num_')}={v}" for k, v in candidate.items()),
        registers=int(registers[1]),
        spills=machine.count("LDL") + machine.count("STL"),
        shared=compiled.metadata.shared,
        matrix=", ".join(f"{name} x {n}" for name, n in found.items() if n) or "-",
        instructions=rate(launch, candidate)(machine),
    )


def jobs(part: bool) -> list[tuple[int, int, int]]:
    """Launch, architecture and candidate of all to compile; float32 for two architectures.

    In part: each launch's first candidate for one architecture, which differs from launch to launch.
    """
    found = []
    for index, launch in enumerate(record()):
        archs = [arch for arch in SHARED_LIMIT if arch in (80, 90) or "fp32" not in launch.case]
        for arch in [archs[index % len(archs)]] if part else archs:
            count = 1 if part else len(candidates(launch, arch))
            found += [(index, arch, number) for number in range(count)]
    return found


def compile_all(processes: int, part: bool = False) -> list[Row]:
    """All that `jobs` names."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_launch, *zip(*jobs(part), strict=True), chunksize=3))


def violations(rows: list[Row], budget: dict[str, Any]) -> list[str]:
    """What in `rows` is beyond `budget`, in words."""
    found = []
    for row in rows:
        name = f"{row.kernel} on sm_{row.arch}" + (f", {row.candidate}" if row.candidate else "")
        if row.spills:
            found.append(f"{name}: {row.spills} instructions spill registers")
        allowed = budget.get(row.kernel, {}).get(str(row.arch))
        if allowed is None:
            found.append(f"{name}: not in the budget")
            continue
        if row.registers > allowed["registers"]:
            found.append(f"{name}: {row.registers} registers, budget {allowed['registers']}")
        if row.shared > min(allowed["shared"], SHARED_LIMIT[row.arch] * 1024):
            found.append(f"{name}: {row.shared} bytes of shared memory, budget {allowed['shared']}")
        if allowed["matrix"] and allowed["matrix"] not in row.matrix.split():
            found.append(f"{name}: no {allowed['matrix']} among {row.matrix}")
    return found


def not_compiled(rows: list[Row], budget: dict[str, Any]) -> list[str]:
    """What stands in the budget and was not compiled, in words."""
    compiled = {(row.kernel, str(row.arch)) for row in rows}
    return [
        f"{kernel}: in the budget, not compiled for sm_{arch}"
        for kernel, archs in budget.items()
        for arch in archs
        if (kernel, arch) not in compiled
    ]


def budget_of(rows: list[Row]) -> dict[str, Any]:
    """A budget over all candidates, with room for what another compiler version may do: a quarter.

    Where a candidate says how far ptxas may go, it may. Float32 products are unrolled over registers,
    as many as there are: only spills matter.
    """
    budget: dict[str, Any] = defaultdict(dict)
    for (kernel, arch), alike in grouped(rows).items():
        names = (MATRIX[arch], "HMMA")
        everywhere = [n for n in names if all(n in row.matrix.split() for row in alike)]
        most = [int(n) for row in alike for n in re.findall(r"maxnreg=(\d+)", row.candidate)]
        registers = max(*most, *(row.registers * 5 // 4 for row in alike), 255 * ("fp32" in kernel))
        budget[kernel][str(arch)] = {
            "registers": min(255, registers),
            "shared": max(row.shared for row in alike) + 2048,
            "matrix": (*everywhere, "")[0],
        }
    return budget


def grouped(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """The candidates of each kernel on each architecture."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.kernel, row.arch].append(row)
    return found


def markdown(rows: list[Row]) -> str:
    """The table, a line a kernel and a column an architecture."""
    archs = list(SHARED_LIMIT)
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |"]
    lines.append("|---" * (len(archs) + 1) + "|")
    groups = grouped(rows)
    for kernel in dict.fromkeys(row.kernel for row in rows):
        cells = (cell(groups[kernel, arch]) if (kernel, arch) in groups else "" for arch in archs)
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(alike: list[Row]) -> str:
    """Candidates; registers from the fewest to the most; spills; shared memory; instructions."""
    low, high = min(row.registers for row in alike), max(row.registers for row in alike)
    registers = str(low) if low == high else f"{low}-{high}"
    shared = max(row.shared for row in alike) / 1024
    first = alike[0].instructions
    told = [str(len(alike)), registers, str(sum(row.spills for row in alike)), f"{shared:.0f} KiB"]
    told += [alike[0].matrix.split()[-3] if " x " in alike[0].matrix else "-"]
    return " / ".join([*told, "-" if first is None else f"{first:.0f}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slice", action="store_true", help="a part of it, in less time")
    parser.add_argument("--write", action="store_true", help="rewrite the budget and the docs")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if tuning.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows = compile_all(options.processes, options.slice)
    print(f"Triton {triton.__version__}\n\n{markdown(rows)}")
    budget = budget_of(rows) if options.write else json.loads(BUDGET.read_text())
    found = violations(rows, budget)
    if not options.slice:
        found += not_compiled(rows, budget)
    print("\n".join(found) or f"{len(rows)} candidates within the budget")
    if options.write and not found:
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
        before, rest = DOCS.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        note = f"Triton {triton.__version__}.\n\n"
        DOCS.write_text(before + MARKS[0] + note + markdown(rows) + MARKS[1] + after)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
