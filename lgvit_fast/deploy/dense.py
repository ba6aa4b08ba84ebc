"""A model without exits on the runtimes: one ONNX graph, in float32 or int8, to compare with."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.runtimes.loaders import LOADERS
from lgvit_fast.runtimes.segment_graph import OPSET

__all__ = ["TITLES", "export_dense", "load_dense", "quantize", "why_not"]

# What the runtimes are called where people read.
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def why_not(runtime: str, precision: str) -> str | None:
    """Why a model cannot be exported for a runtime here, with the pip command; None if it can."""
    needed = ["onnx", "onnxscript", runtime] + (["onnxruntime"] if precision == "int8" else [])
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
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    program.save(str(path))


def quantize(source: Path, path: Path) -> None:
    """int8 weights and activations: ONNX Runtime's dynamic quantization, per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(str(prepared), str(path), per_channel=True, weight_type=QuantType.QInt8)


def load_dense(
    path: str | Path, runtime: str, threads: int
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What answers images `[B, C, H, W]` with logits `[B, K]`; these are the runtime's own memory."""
    run, _, _ = LOADERS[runtime](threads)(Path(path).read_bytes())
    return lambda images: np.asarray(run(images)[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' advice to their developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
