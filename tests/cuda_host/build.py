"""Compiles the CUDA kernels of csrc/stable/cuda for the host, against the runtime beside this file.

Each fault of `FAULTS` is compiled in beside the right code and off until it is chosen, so that tests
can see it found without another build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "stable" / "cuda"
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]

# What is not C++ in a .cu file, and what it becomes.
REWRITES = (
    (r"(\w+)<<<(.+?)>>>\((.*)\);", r"cuda_host::launch(\1, \2, \3);"),
    (
        r"__shared__ ([\w:]+) (\w+)((?:\[[^\]]*\])*);",
        r"auto& \2 = cuda_host::shared<\1\3>(__COUNTER__);",
    ),
)

_LAST = "last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;"

# Faults by name: statements of the kernels without their comments, and what a faulty kernel has in
# their place. The first six are races.
FAULTS = {
    "rows move while others read them": (
        "if (!last_to_finish(args.finished)) return;",
        "if (blockIdx.x != 0) return;",
    ),
    "no fence before a block counts as finished": (
        f"__threadfence();\n    {_LAST}\n    __threadfence();",
        f"{_LAST} __threadfence();",
    ),
    "no fence after the last block is told": (
        f"__threadfence();\n    {_LAST}\n    __threadfence();",
        f"__threadfence(); {_LAST}",
    ),
    "holes counted before the counter is cleared": (
        "if (threadIdx.x == 0) plan.num_moves = 0;\n  __syncthreads();",
        "if (threadIdx.x == 0) plan.num_moves = 0;",
    ),
    "order patched while it is filled": (
        "for (int row = threadIdx.x; row < n; row += kThreads) order[row] = uint16_t(row);\n"
        "    __syncthreads();",
        "for (int row = threadIdx.x; row < n; row += kThreads) order[row] = uint16_t(row);",
    ),
    "sums of other warps read before they are written": (
        "part[threadIdx.y][threadIdx.x] = sums;\n    __syncthreads();",
        "part[threadIdx.y][threadIdx.x] = sums;",
    ),
    "half of the threads miss a barrier": (
        "__syncthreads();\n  return last;",
        "if (threadIdx.x < 128) __syncthreads();\n  return last;",
    ),
    "answers written beyond the buffer": (
        "if (row < 0 || row >= args.answers) continue;",
        "",
    ),
}


def compiler() -> str | None:
    """The C++ compiler; None where there is none, or no Linux, which the scheduler needs."""
    return shutil.which(os.environ.get("CXX", "g++")) if sys.platform == "linux" else None


def rewritten(text: str) -> str:
    """CUDA C++ as plain C++."""
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return text


def sources(folder: Path) -> None:
    """Write the kernels as C++ into a folder, with all faults."""
    texts = {
        path: re.sub(r" *//.*", "", path.read_text())
        for path in sorted(KERNELS.glob("*"))
        if path.suffix != ".cpp"
    }
    faulty: dict[str, str] = {}
    for number, (right, wrong) in enumerate(FAULTS.values(), 1):
        earlier = faulty.get(right, "")
        faulty[right] = f"{earlier}if (cuda_host::fault == {number}) {{ {wrong}\n}} else "
    for right, branches in faulty.items():
        found = [path for path, text in texts.items() if right in text]
        if len(found) != 1:
            raise ValueError(f"{len(found)} files of {KERNELS} have the statements {right!r}")
        texts[found[0]] = texts[found[0]].replace(right, f"{branches}{{ {right}\n}}")
    for path, text in texts.items():
        name = path.with_suffix(".cc").name if path.suffix == ".cu" else path.name
        (folder / name).write_text(rewritten(text))
    for path in HERE.glob("*.[hc]*"):
        shutil.copy(path, folder)


def build(folder: Path, main: str = "kernels.cpp", sanitize: str = "") -> Path:
    """Compile `main` with the scheduler in `folder`.

    Args:
        folder: an empty one; receives everything.
        main: "kernels.cpp" for a library, or a file with a `main` for a program.
        sanitize: sanitizers of the compiler, as "address,undefined".
    """
    command = compiler()
    assert command is not None
    sources(folder)
    checked = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    jobs = {
        # The sanitizers see the kernels' accesses alone.
        "scheduler": ["-O2", *(["-DCUDA_HOST_TSAN"] if "thread" in sanitize else [])],
        Path(main).stem: ["-O1", *checked],
    }
    # Not the compiler is to be checked.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    running = [
        subprocess.Popen(
            [command, *FLAGS, *flags, "-I.", "-c", f"{name}.cpp", "-o", f"{name}.o"],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, flags in jobs.items()
    ]
    for job in running:
        _, errors = job.communicate()
        if job.returncode:
            raise RuntimeError(errors)
    shared = ["-shared"] if main == "kernels.cpp" else []
    target = folder / ("kernels.so" if shared else "program")
    objects = [f"{name}.o" for name in jobs]
    subprocess.run(
        [command, *shared, *checked, *objects, "-o", str(target)],
        cwd=folder,
        env=environment,
        check=True,
    )
    return target
