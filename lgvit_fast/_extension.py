"""The compiled operators: loads them where they fit this torch and processor, else says why not.

Importing this module registers ``torch.ops.lgvit_fast.*``. Nothing here is needed for function: what
is missing costs speed, and `why_missing` gives the reason and the cure in plain words.

Two kinds of libraries: `_C` keeps to torch's stable ABI and runs on every torch from the one that it
was built to target; `_dispatch` and `_cpu_*` need the minor version they were compiled against.
"""

import importlib
import importlib.machinery
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from lgvit_fast import _autograd_kernels

HOW_TO_BUILD = (
    "build it in a checkout of lgvit-fast with `pip install --no-build-isolation --no-deps -e .`"
)

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class BuildFacts:
    """How the extension was built.

    Attributes:
        torch: Version of torch it was compiled against, as "2.14.1+cu130".
        stable_target: The oldest torch that the part within the stable ABI runs on, as "2.11".
        cuda: Version of the CUDA toolkit that compiled the CUDA part; None if there is none.
        cuda_archs: GPU architectures compiled for, as ("8.0", "9.0", "12.0+PTX").
        compiler: The C++ compiler.
        cxx11_abi: Whether it uses the C++11 ABI of libstdc++.
        summary: All that matters in one line, as "compiled with CUDA 13.0 for 8.0 9.0".
    """

    torch: str
    stable_target: str
    cuda: str | None
    cuda_archs: tuple[str, ...]
    compiler: str
    cxx11_abi: bool
    summary: str


def facts() -> BuildFacts | None:
    """How the extension was built; None if it was not."""
    return _facts


def why_missing(device: torch.device | None = None) -> str | None:
    """Why the compiled operators cannot all run on `device`, in plain words; None if they can.

    Without a device: why they are not loaded at all.
    """
    if _problem is None and device is not None and device.type == "cpu":
        return _cpu_problem
    return why_compact_missing(device)


def why_compact_missing(device: torch.device | None = None) -> str | None:
    """As `why_missing`, for `compact_` alone: it runs on more versions of torch than the others."""
    if _problem is not None or device is None or device.type == "cpu":
        return _problem
    if device.type == "cuda":
        if device.index not in _cuda_problems:
            _cuda_problems[device.index] = _cuda_problem(device.index)
        return _cuda_problems[device.index]
    return f"the extension has no kernels for {device.type!r} devices"


def _read_facts() -> BuildFacts | None:
    try:
        build = importlib.import_module("lgvit_fast._build")
    except ImportError:
        return None
    if not hasattr(build, "stable_target"):
        return None  # a build of an earlier checkout, whose libraries are other ones
    return BuildFacts(
        torch=build.torch_version,
        stable_target=build.stable_target,
        cuda=build.cuda_version or None,
        cuda_archs=tuple(build.cuda_archs.split()),
        compiler=build.compiler,
        cxx11_abi=build.cxx11_abi,
        summary=build.summary,
    )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _mismatch(built: BuildFacts, running: str, running_cuda: str | None) -> str | None:
    """Why nothing of an extension built so must be loaded into the torch that is running."""
    if _minor(running) < _minor(built.stable_target):
        return f"the extension needs torch {built.stable_target} or newer, this is torch {running}"
    if built.cuda and built.cuda.split(".")[0] != (running_cuda or "").split(".")[0]:
        has = f"CUDA {running_cuda}" if running_cuda else "no CUDA"
        return f"the extension was built with CUDA {built.cuda}, this torch {running} has {has}"
    return None


def _version_mismatch(built: BuildFacts, running: str) -> str | None:
    """Why the libraries beyond the stable ABI must not be loaded into the torch that is running."""
    if _minor(built.torch) != _minor(running):
        return f"the heads' kernels were built for torch {built.torch}, this is torch {running}"
    return None


def _load(built: BuildFacts | None) -> tuple[str | None, str | None]:
    """Loads the libraries; returns why there are no operators at all, and why not all for the CPU."""
    if built is None:
        reason = f"the extension is not built; {HOW_TO_BUILD}"
        return reason, reason
    problem = _mismatch(built, torch.__version__, torch.version.cuda)
    if problem is None:
        try:
            if _load_library("_C"):
                return None, _load_cpu(built)
            problem = "the extension is incomplete"
        except OSError as error:
            problem = f"the extension does not load: {error}"
    problem = f"{problem}; {HOW_TO_BUILD}"
    warnings.warn(f"lgvit_fast runs on plain torch: {problem}", RuntimeWarning, stacklevel=2)
    return problem, problem


def _load_cpu(built: BuildFacts) -> str | None:
    """Loads what needs the minor version of torch it was built for, or says why not.

    That another version lacks it is no fault of the installation, so it gives no warning; each op
    that falls back logs the reason.
    """
    problem = _version_mismatch(built, torch.__version__)
    compiled = False  # the autograd kernels
    if problem is None:
        try:
            compiled = _load_library("_dispatch")
            if compiled:
                return _load_cpu_kernels()
            problem = "the extension is incomplete"
        except OSError as error:
            problem = f"the heads' kernels do not load: {error}"
            warnings.warn(f"lgvit_fast: {problem}; {HOW_TO_BUILD}", RuntimeWarning, stacklevel=2)
    if not compiled:
        _autograd_kernels.register()
    return f"{problem}; {HOW_TO_BUILD}"


def _load_cpu_kernels() -> str | None:
    """Loads the CPU kernels for the best instruction set that torch uses here, or says why not."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64"):
        names = ["default"]
    elif capability.startswith("AVX512"):
        names = ["avx512", "avx2"]
    else:
        names = ["avx2"] if capability == "AVX2" else []
    if any(_load_library(f"_cpu_{name}") for name in names):
        return None
    return f"the extension has no kernels for this processor ({capability})"


def _load_library(name: str) -> bool:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = _FOLDER / f"{name}{suffix}"
        if path.exists():
            torch.ops.load_library(str(path))
            return True
    return False


def _cuda_problem(index: int | None) -> str | None:
    if _facts is None or _facts.cuda is None:
        return f"the extension was built without CUDA; {HOW_TO_BUILD}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(index)
    for arch in _facts.cuda_archs:
        number, _, ptx = arch.partition("+")
        built = tuple(int(part) for part in number.rstrip("af").split("."))
        # Machine code runs on its own major version from its minor version on, PTX on anything
        # later. Code for a suffixed architecture ("9.0a") runs on exactly that one.
        if number[-1] in "af":
            fits = built == (major, minor)
        else:
            fits = (built[0] == major and built[1] <= minor) or (
                ptx == "PTX" and built <= (major, minor)
            )
        if fits:
            return None
    return (
        f"the extension was built for GPU architectures {' '.join(_facts.cuda_archs)}, this one is"
        f" {major}.{minor}; set TORCH_CUDA_ARCH_LIST={major}.{minor} and {HOW_TO_BUILD}"
    )


_facts = _read_facts()
_problem, _cpu_problem = _load(_facts)
_cuda_problems: dict[int | None, str | None] = {}
