"""`lgvit_fast.export`: a model as a folder of graphs. The side of `deploy` that needs torch."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lgvit_fast import ops
from lgvit_fast._version import __version__
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.deploy.executorch_file import executorch_version, to_program
from lgvit_fast.deploy.manifest import PRECISIONS, Manifest, SegmentFile, is_exported
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
) -> Path:
    """Write a model for ONNX Runtime or OpenVINO; `lgvit_fast.deploy.Deployed` runs it without torch.

    The folder gets E + 1 ONNX graphs, or one ExecuTorch program, and `manifest.json`; it appears whole
    or not at all. An export that was there is replaced. Images have the size the model was made for.

    Args:
        model: in eval mode, float32, on the CPU.
        folder: where to.
        precision: "float32".
        format: "onnx", or "executorch" for one program with a method a segment, lowered to XNNPACK, for
            phones: float32, at most 8 images a call.

    Returns:
        The folder.

    Raises:
        RuntimeError: the model is in train mode, or what writes the format is not installed (onnx and
            onnxscript, or executorch).
        ValueError: bad arguments; a model of another dtype or device, packed, or with a head that has
            no known inference form; a segment beyond the 2 GB of an ONNX file.
        FileExistsError: the folder holds something else than an export.
    """
    folder = Path(folder)
    _check(model, precision, format)
    occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if occupied and not is_exported(folder):
        raise FileExistsError(f"{folder} exists and is no exported model: name another folder")
    # Whatever is not installed is told before anything is written.
    onnx = require_onnx() if format == "onnx" else None
    writer = {"onnx": onnx.__version__} if onnx else {"executorch": executorch_version()}
    spec = InputSpec.of(model.backbone)
    files: list[SegmentFile] = []
    with _appearing(folder) as temporary:
        if onnx:
            for segment, proto in segment_graphs(model, spec.size):
                onnx.checker.check_model(proto, full_check=True)
                name = f"segment_{segment.index}.onnx"
                files.append(_write(temporary / name, proto.SerializeToString(deterministic=True)))
        else:
            with torch.no_grad(), ops.backend("torch"), quiet():
                program = to_program(segment_modules(model, spec.size))
            files.append(_write(temporary / "segments.pte", program))
        _manifest(model, spec, precision, format, files, writer).save(temporary)
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


def _write(path: Path, data: bytes) -> SegmentFile:
    """Write a file to disk, and describe it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return SegmentFile(path.name, hashlib.sha256(data).hexdigest(), len(data))


def _manifest(
    model: LGViT,
    spec: InputSpec,
    precision: str,
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
        precision=precision,
        opset=OPSET if format == "onnx" else None,
        segments=tuple(files),
        made_with={"lgvit_fast": __version__, "torch": str(torch.__version__), **writer},
        file_format=format,
    )
