"""A model without exits on the runtimes: one ONNX graph, in float32 or int8, to compare with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.runtimes.loaders import LOADERS
from lgvit_fast.runtimes.segment_graph import OPSET, quiet

__all__ = ["TITLES", "export_dense", "load_dense", "quantize", "why_not"]

# What the runtimes are called where people read.
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def why_not(runtime: str, precision: str) -> str | None:
    """Why a model cannot be exported for a runtime here, with the pip command; None if it can."""
    needed = ["onnx", "onnxscript", runtime]
    missing = [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def export_dense(model: nn.Module, spec: InputSpec, path: Path) -> None:
    """Write a model of images as one ONNX graph for any batch size.

    Args:
        model: in eval mode, float32, on the CPU.
        spec: its images.
        path: of the file.
    """
    example = torch.zeros(2, spec.channels, *spec.size)  # a batch of one is taken for a constant
    with torch.no_grad(), quiet():
        program: Any = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    program.save(str(path))


def quantize(source: Path, path: Path, runtime: str) -> None:
    """A dense graph in int8, as one would have it on a runtime.

    On OpenVINO as `lgvit_fast.export` does it, with scales a row; on ONNX Runtime, which has nothing
    like it, by its dynamic quantization, per channel: one range for the activations of a whole batch.
    """
    if runtime == "openvino":
        import onnx

        from lgvit_fast.deploy import int8

        onnx.save(int8.quantize(onnx.load(str(source))), str(path))
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(str(prepared), str(path), per_channel=True, weight_type=QuantType.QInt8)


def load_dense(
    path: str | Path, runtime: str, threads: int
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What answers images `[B, C, H, W]` with logits `[B, K]`; these are the runtime's own memory.

    Idle threads of ONNX Runtime spin as long as they do by default, so load one graph a process.
    """
    run, _, _ = LOADERS[runtime](threads, alone=True)(Path(path).read_bytes())
    return lambda images: np.asarray(run(images)[0])
