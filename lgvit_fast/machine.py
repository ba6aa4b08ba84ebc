"""What numbers were measured on: versions, processor, devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from lgvit_fast._version import __version__

__all__ = ["machine"]

# Those that decide how fast matrices are multiplied, under Linux's names.
_INSTRUCTIONS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8"),
    *("asimd", "asimddp", "sve", "bf16", "i8mm"),
)


def machine() -> dict[str, Any]:
    """Versions and hardware as json types; an absent package is None."""
    return {
        "lgvit_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _version("timm"),
        "triton": _version("triton"),
        "onnxruntime": _version("onnxruntime"),
        "openvino": _version("openvino"),
        "platform": platform.platform(),
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30),
            }
            for index in range(torch.cuda.device_count())
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """The instruction sets that matter here and that this processor has."""
    words = {word for line in _cpuinfo() for word in line.split()}
    return [name for name in _INSTRUCTIONS if name in words]


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
