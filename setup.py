"""Builds the compiled operators. Metadata is in pyproject.toml.

LGVIT_BUILD chooses what to compile:
    auto  C++, and CUDA if torch is a CUDA build and an nvcc of the same major version is found
          (with or without a GPU in this machine); the default
    cpu   C++ only
    cuda  C++ and CUDA; an error if that is not possible
    cuda-only  CUDA without the CPU's kernels, which take most of the time (`make gpu-check`)
    none  nothing: everything then runs on plain torch and Triton

LGVIT_SANITIZE names sanitizers of the compiler to build with, as "address,undefined" (`make sanitize`).
Of the CPU libraries only one is then built, the one that runs on most processors.

TORCH_CUDA_ARCH_LIST names the GPU architectures, as for any torch extension. CUDA_HOME names the
toolkit; without it, the one that `nvcc` on PATH belongs to is taken.
"""

import os
import platform
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

# Data centre and desktop GPUs from Ampere on; the last also as PTX, for what comes after it.
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# The oldest torch that the libraries of csrc/stable run on, with every later one: what they use of the
# stable ABI is held down to it.
STABLE_TARGET = (2, 11)

# What csrc/cpu is compiled for, one library each; lgvit_fast/_extension.py loads the best that the
# processor runs. Separate libraries, because inline functions compiled with wide instructions must
# never be linked into code that runs elsewhere.
CPU_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
    "default": [],
}


def build_mode() -> str:
    """The value of LGVIT_BUILD."""
    mode = os.environ.get("LGVIT_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "cuda-only", "none"):
        raise SystemExit(f"LGVIT_BUILD must be auto, cpu, cuda, cuda-only or none; got {mode!r}")
    return mode


def find_nvcc() -> tuple[Path, str] | str:
    """The CUDA toolkit's folder and version, or why there is none.

    The `nvcc` on PATH may be a script or a link somewhere else, so nvcc itself is asked.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc on PATH and CUDA_HOME is not set"
    try:
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        about = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} does not run: {error}"
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    version = re.search(r"release (\d+\.\d+)", about.stdout)
    if version is None or (top is None and home is None):
        return f"{nvcc} does not say its version and folder"
    folder = Path(top[1]).resolve() if top and not home else Path(home)
    return folder, version[1]


def find_cuda(mode: str) -> str | None:
    """Version of the CUDA toolkit to compile with, None for none; sets the environment for torch."""
    if mode == "cpu":
        return None
    import torch

    if torch.version.cuda is None:
        problem = f"torch {torch.__version__} is built without CUDA"
    else:
        found = find_nvcc()
        if isinstance(found, str):
            problem = found
        elif found[1].split(".")[0] != torch.version.cuda.split(".")[0]:
            problem = (
                f"nvcc is of CUDA {found[1]}, torch {torch.__version__} of {torch.version.cuda}"
            )
        else:
            home, version = found
            os.environ["CUDA_HOME"] = str(home)  # torch.utils.cpp_extension reads it when imported
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_archs(home))
            return version
    if mode in ("cuda", "cuda-only"):
        raise SystemExit(f"LGVIT_BUILD={mode}: {problem}")
    print(f"lgvit_fast: compiling without CUDA: {problem}")
    return None


def default_archs(home: Path) -> str:
    """Those of DEFAULT_ARCHS that this nvcc knows, the last with PTX."""
    nvcc = [str(home / "bin" / "nvcc"), "--list-gpu-arch"]
    known = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in DEFAULT_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    return " ".join(archs) + "+PTX"


def cuda_archs() -> str:
    """The architectures that torch will pass to nvcc for TORCH_CUDA_ARCH_LIST, as "8.0 9.0+PTX"."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    flags = _get_cuda_arch_flags()
    found = {code for flag in flags for code in re.findall(r"code=((?:sm|compute)_\w+)", flag)}
    numbers = {code.split("_")[1] for code in found}

    def text(number: str) -> str:
        major, minor = re.fullmatch(r"(\d+)(\d[af]?)", number).groups()
        return f"{major}.{minor}" + ("+PTX" if f"compute_{number}" in found else "")

    return " ".join(text(n) for n in sorted(numbers, key=lambda n: int(n.rstrip("af"))))


def extensions(mode: str) -> tuple[list[Extension], dict[str, type]]:
    """The extension modules of a build mode and the command that builds them."""
    if mode == "none":
        return [], {}
    cuda = find_cuda(mode)

    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Gives each extension its own folder of objects: csrc/cpu is compiled more than once."""

        def build_extension(self, ext: Extension) -> None:
            parent = self.build_temp
            self.build_temp = os.path.join(parent, ext.name)
            super().build_extension(ext)
            self.build_temp = parent

    facts = {
        "LGVIT_TORCH_VERSION": torch.__version__,
        "LGVIT_STABLE_TARGET": ".".join(map(str, STABLE_TARGET)),
        "LGVIT_CUDA_VERSION": cuda or "",
        "LGVIT_CUDA_ARCHS": cuda_archs() if cuda else "",
    }
    abi = ("LGVIT_CXX11_ABI", str(int(torch.compiled_with_cxx11_abi())))
    cxx = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    link = ["-fopenmp"]
    sanitizers = os.environ.get("LGVIT_SANITIZE")
    if sanitizers:
        link = [*link, f"-fsanitize={sanitizers}"]
        cxx = [flag for flag in cxx if flag not in ("-O3", "-g0")]
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}"]
        cxx += ["-fno-sanitize-recover=all"]
    modules = [
        Extension(
            "lgvit_fast._build",
            ["csrc/build_info.cpp"],
            include_dirs=[pybind11.get_include()],
            define_macros=[(key, f'"{value}"') for key, value in facts.items()] + [abi],
            extra_compile_args={"cxx": ["-O1", "-g0", "-fvisibility=hidden"]},
            language="c++",
        ),
        (CUDAExtension if cuda else CppExtension)(
            "lgvit_fast._C",
            sorted(glob("csrc/stable/*.cpp") + (glob("csrc/stable/cuda/*.c*") if cuda else [])),
            define_macros=[
                (
                    "TORCH_TARGET_VERSION",
                    f"0x{STABLE_TARGET[0]:02x}{STABLE_TARGET[1]:02x}{0:012x}ULL",
                ),
                *([("USE_CUDA", None)] if cuda else []),  # declares the interface's CUDA part
            ],
            extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]},
            extra_link_args=link,
            py_limited_api=True,  # no Python in it: operators reach Python through torch.ops
        ),
        CppExtension(
            "lgvit_fast._dispatch",
            ["csrc/dispatch.cpp"],
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
            py_limited_api=True,
        ),
    ]
    x86 = platform.machine() in ("x86_64", "AMD64")
    names = ("avx2", "avx512") if x86 else ("default",)
    if mode == "cuda-only":
        names = ()
    for name in names[:1] if sanitizers else names:
        capability = name.upper()
        modules.append(
            CppExtension(
                f"lgvit_fast._cpu_{name}",
                sorted(glob("csrc/cpu/*.cpp")),
                define_macros=[
                    ("CPU_CAPABILITY", capability),
                    (f"CPU_CAPABILITY_{capability}", None),
                ],
                extra_compile_args={"cxx": [*cxx, *CPU_FLAGS[name]]},
                extra_link_args=link,
                py_limited_api=True,
            )
        )
    return modules, {"build_ext": Build}


if __name__ == "__main__":
    ext_modules, cmdclass = extensions(build_mode())
    setup(
        packages=[
            *find_packages(include=["lgvit_fast", "lgvit_fast.*"]),
            "lgvit_fast.kernels",
            *(f"lgvit_fast.kernels.{name}" for name in find_packages("kernels")),
        ],
        package_dir={"lgvit_fast.kernels": "kernels"},
        package_data={
            "lgvit_fast": ["py.typed"],
            "lgvit_fast.evaluation.report": ["page.*"],
            "lgvit_fast.serve": ["page/*"],
        },
        ext_modules=ext_modules,
        cmdclass=cmdclass,
    )
