"""Graphs for the runtimes: a dense model as one ONNX file, and quantized to int8."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.model import LGViT

__all__ = ["export_dense", "export_early", "quantize", "why_not"]

_OPSET = 20


def why_not(engine: str, precision: str) -> str | None:
    """Why a runtime cannot be measured here, with what would change that; None if it can."""
    needed = ["onnx", "onnxscript", engine] + (["onnxruntime"] if precision == "int8" else [])
    missing = [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("lgvit_fast.deploy") is None:
        return "this installation cannot export models"
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
            opset_version=_OPSET,
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


def export_early(model: LGViT, folder: Path, precision: str, calibration: Tensor) -> None:
    """Write an early-exit model for the runtimes (`lgvit_fast.export`).

    Args:
        model: in eval mode, float32, on the CPU.
        folder: where to.
        precision: "float32" or "int8".
        calibration: images `[n, C, H, W]` for int8; not those that are reported on.

    Raises:
        ValueError: a model or precision that cannot be exported, too few images, or int8 that is
            refused, with the figures.
    """
    export: Any = import_module("lgvit_fast.deploy.exporter").export
    options: dict[str, Any] = {} if precision == "float32" else {"calibration": calibration}
    export(model, folder, precision=precision, **options)


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
