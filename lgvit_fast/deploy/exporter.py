"""`lgvit_fast.export`: a model as a folder of graphs. The side of `deploy` that needs torch."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lgvit_fast import ops
from lgvit_fast._version import __version__
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.deploy.calibration_images import calibration_images
from lgvit_fast.deploy.executorch_file import executorch_version, to_program
from lgvit_fast.deploy.int8_export import convert
from lgvit_fast.deploy.manifest import PRECISIONS, Manifest, SegmentFile, is_exported, write_segment
from lgvit_fast.deploy.preprocess import Preprocessing
from lgvit_fast.model import LGViT
from lgvit_fast.policies import to_dict
from lgvit_fast.runtimes.loaders import FORMATS
from lgvit_fast.runtimes.segment_graph import (
    OPSET,
    check_model,
    quiet,
    require_onnx,
    segment_graphs,
    segment_modules,
)

__all__ = ["export"]


def export(
    model: LGViT,
    folder: str | os.PathLike[str],
    *,
    precision: str = "float32",
    format: str = "onnx",
    calibration: Any = None,
    force: bool = False,
) -> Path:
    """Write a model for ONNX Runtime or OpenVINO; `lgvit_fast.deploy.Deployed` runs it without torch.

    The folder gets E + 1 ONNX graphs, or one ExecuTorch program, and `manifest.json`; it appears whole
    or not at all. An export that was there is replaced. Images have the size the model was made for.

    Args:
        model: in eval mode, float32, on the CPU.
        folder: where to.
        precision: "float32", or "int8" for weight matrices in 8 bits (`deploy.int8`), thresholds
            fitted to the logits that these give.
        format: "onnx", or "executorch" for one program with a method a segment, lowered to XNNPACK, for
            phones: float32, at most 8 images a call.
        calibration: images for int8, without labels, at least 100 that took no part in training: a
            folder or tar of class folders, inputs `[n, C, H, W]`, or a loader of such inputs. What
            every exit answers to them is compared with float32.
        force: export int8 even where it loses more answers than 3 in 100 at full depth, or gains no
            time on this machine.

    Returns:
        The folder.

    Raises:
        Int8Refused: int8 is not worth it here; a `ValueError` that gives the figures.
        RuntimeError: the model is in train mode, or what writes the format is not installed (onnx and
            onnxscript, or executorch), or, for int8, no runtime.
        ValueError: bad arguments, no calibration images for int8; a model of another dtype or device,
            packed, or with a head that has no known inference form; a segment beyond the 2 GB of an
            ONNX file.
        FileExistsError: the folder holds something else than an export.
    """
    folder = Path(folder)
    _check(model, precision, format)
    if precision == "float32" and (calibration is not None or force):
        raise ValueError("calibration and force are for precision='int8', which was not asked for")
    occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if occupied and not is_exported(folder):
        raise FileExistsError(f"{folder} exists and is no exported model: name another folder")
    # Whatever is not installed is told before anything is written.
    onnx = require_onnx() if format == "onnx" else None
    writer = {"onnx": onnx.__version__} if onnx else {"executorch": executorch_version()}
    spec = InputSpec.of(model.backbone)
    images = calibration_images(calibration, spec) if precision == "int8" else None
    files: list[SegmentFile] = []
    with _appearing(folder) as new:
        temporary = new if images is None else Path(tempfile.mkdtemp(dir=new.parent))
        if onnx:
            for segment, proto in segment_graphs(model, spec.size):
                onnx.checker.check_model(proto, full_check=True)
                data = proto.SerializeToString(deterministic=True)
                files.append(write_segment(temporary / f"segment_{segment.index}.onnx", data))
        else:
            with torch.no_grad(), ops.backend("torch"), quiet():
                program = to_program(segment_modules(model, spec.size))
            files.append(write_segment(temporary / "segments.pte", program))
        _manifest(model, spec, format, files, writer).save(temporary)
        if images is not None:
            convert(temporary, new, images, force)
    return folder


def _check(model: LGViT, precision: str, format: str) -> None:
    """Refuse what cannot be exported, before anything is written."""
    if format not in FORMATS:
        raise ValueError(f"format={format!r}, expected one of {', '.join(FORMATS)}")
    if format == "executorch" and precision != "float32":
        raise ValueError(
            f"precision={precision!r}, expected float32: format='executorch' has no other"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not isinstance(model, LGViT):
        raise ValueError(f"model is a {type(model).__name__}, expected an LGViT")
    if model.training:
        raise RuntimeError("export needs eval mode: call model.eval() first")
    check_model(model)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end, or vanishes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        if folder.exists():
            os.replace(folder, work / "old")
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _manifest(
    model: LGViT,
    spec: InputSpec,
    format: str,
    files: Sequence[SegmentFile],
    writer: dict[str, str],
) -> Manifest:
    names = model.class_names
    return Manifest(
        layers=(*(exit.layer for exit in model.exits), model.num_blocks),
        heads=tuple(exit.head for exit in model.exits),
        num_classes=model.num_classes,
        class_names=None if names is None else tuple(names),
        policy=None if to_dict(model.policy) is None else model.policy,
        certificate=None if model.certificate is None else model.certificate.to_dict(),
        preprocessing=Preprocessing(**dataclasses.asdict(spec)),
        precision="float32",
        opset=OPSET if format == "onnx" else None,
        segments=tuple(files),
        made_with={"lgvit_fast": __version__, "torch": str(torch.__version__), **writer},
        file_format=format,
    )
