"""`lgvit_fast.export`: a model as one ONNX graph a segment. The side of `deploy` that needs torch.

A graph takes the images or the tokens of the segment before it and gives the tokens after its last
block, the exit's logits and what a policy asks of them. Heads are in their exact inference form, so a
graph holds about half of what the published heads compute.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lgvit_fast import ops
from lgvit_fast._version import __version__
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.deploy.calibration_images import calibration_images
from lgvit_fast.deploy.int8_export import convert
from lgvit_fast.deploy.manifest import PRECISIONS, Manifest, SegmentFile, is_exported, write_segment
from lgvit_fast.deploy.preprocess import Preprocessing
from lgvit_fast.deploy.runtimes import SegmentOutput
from lgvit_fast.heads import ExitHead
from lgvit_fast.heads.gah import GlobalAggregationHead
from lgvit_fast.heads.lph import LocalPerceptionHead
from lgvit_fast.heads.plain import AttentionHead, BlockHead, ConvHead, LinearHead, MLPHead
from lgvit_fast.model import LGViT
from lgvit_fast.ops.linear import PackedLinear
from lgvit_fast.policies import NEVER, to_dict
from lgvit_fast.segments import Segment, cut

__all__ = ["export"]

FORMATS = ("onnx",)
OPSET = 20  # the first with Gelu
_LARGEST = 2**31 - 1  # bytes of a protobuf message
_HEADS = (
    LocalPerceptionHead,
    GlobalAggregationHead,
    LinearHead,
    BlockHead,
    ConvHead,
    AttentionHead,
    MLPHead,
)


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

    The folder gets E + 1 ONNX graphs and `manifest.json`, and appears whole or not at all. An export
    that was there is replaced. Images have the size that the model was made for.

    Args:
        model: in eval mode, float32, on the CPU.
        folder: where to.
        precision: "float32", or "int8" for weight matrices in 8 bits (`deploy.int8`), thresholds
            fitted to the logits that these give.
        format: "onnx".
        calibration: images for int8, without labels, at least 100 that took no part in training: a
            folder or tar of class folders, inputs `[n, C, H, W]`, or a loader of such inputs. What
            every exit answers to them is compared with float32.
        force: export int8 even where it loses more answers than 3 in 100 at full depth, or gains no
            time on this machine.

    Returns:
        The folder.

    Raises:
        Int8Refused: int8 is not worth it here; a `ValueError` that gives the figures.
        RuntimeError: the model is in train mode, or onnx, onnxscript or, for int8, a runtime is not
            installed.
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
    onnx = _onnx()
    spec = InputSpec.of(model.backbone)
    images = calibration_images(calibration, spec) if precision == "int8" else None
    files: list[SegmentFile] = []
    with torch.no_grad(), ops.backend("torch"), _appearing(folder) as new:
        temporary = new if images is None else Path(tempfile.mkdtemp(dir=new.parent))
        # An example of two images: the exporter takes a batch of one for a constant.
        example = torch.zeros(2, spec.channels, *spec.size)
        heads = [_folded(cast(ExitHead, head)) for head in model.exit_heads]
        for segment in cut(model.adapter, [exit.layer for exit in model.exits], heads):
            proto = _to_onnx(_Graph(segment, spec.size).eval(), example)
            onnx.checker.check_model(proto, full_check=True)
            name = f"segment_{segment.index}.onnx"
            data = proto.SerializeToString(deterministic=True)
            files.append(write_segment(temporary / name, data))
            example = segment.blocks(example, spec.size)
        _manifest(model, spec, files, onnx.__version__).save(temporary)
        if images is not None:
            convert(temporary, new, images, force)
    return folder


class _Graph(nn.Module):
    """A segment in plain PyTorch, its outputs those of `SegmentOutput`.

    Args:
        segment: its head is folded.
        size: `(H, W)` of the images.
    """

    def __init__(self, segment: Segment, size: tuple[int, int]) -> None:
        super().__init__()
        self.segment, self.size = segment, size
        self.backbone = segment.adapter.model  # has the embedding; what is not used is left out
        fields = SegmentOutput._fields
        self.names = fields[:-1] if segment.is_last else fields

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images or tokens to the tensors named by `names`."""
        tokens = self.segment.blocks(x, self.size)
        state = NEVER.start(tokens.shape[0], tokens.device)
        outputs = _statistics(self.segment.exit(tokens, state, self.size).logits)
        return outputs if self.segment.is_last else (*outputs, tokens)


def _statistics(logits: Tensor) -> tuple[Tensor, ...]:
    """Logits, and what the exit rules compare, in the order of `SegmentOutput`."""
    probabilities = torch.softmax(logits, -1)
    terms = probabilities * torch.log_softmax(logits, -1)
    terms = torch.where(probabilities > 0, terms, 0.0)  # 0 log 0 = 0
    largest = logits.amax(-1)
    # Not `softmax.isnan()`: a runtime's vectorised exp and max may turn NaN into a number.
    valid = ~(logits.sum(-1).isnan() | largest.isinf())
    return logits, probabilities.amax(-1), -terms.sum(-1), logits.argmax(-1), valid


def _folded(head: ExitHead) -> ExitHead:
    """A copy of a head, folded into plain tensors; the model's own stays as it was prepared."""
    twin = copy.copy(head)
    twin.folded = twin._watch = None
    twin.prepare(torch.float32)
    return twin


def _to_onnx(graph: _Graph, example: Tensor) -> Any:
    """A segment as an ONNX `ModelProto` that holds its weights."""
    with _quiet():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=list(graph.names),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    assert program is not None
    _take_slices(program.model)
    proto = program.model_proto
    _strip(proto)
    if proto.ByteSize() > _LARGEST:
        segment = graph.segment
        raise ValueError(
            f"blocks {segment.start + 1} to {segment.stop} take {proto.ByteSize()} bytes, an ONNX file"
            f" holds {_LARGEST}: give the model more exits"
        )
    return proto


def _take_slices(model: Any) -> None:
    """Store the parts of a weight that a graph uses, not the weight and how to cut it up."""
    from onnxscript import optimizer

    optimizer.fold_constants(
        model,
        input_size_limit=_LARGEST,
        output_size_limit=_LARGEST,
        should_fold=lambda node: (
            None if node.op_type in ("Slice", "Reshape", "Transpose") else False
        ),
    )
    optimizer.remove_unused_nodes(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own passes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(proto: Any) -> None:
    """Leave out the exporter's notes: source lines of this machine, a third of a small file."""
    proto.ClearField("metadata_props")
    graph = proto.graph
    graph.ClearField("value_info")
    for noted in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")


def _check(model: LGViT, precision: str, format: str) -> None:
    """Refuse what cannot be exported, before anything is written."""
    if format not in FORMATS:
        raise ValueError(f"format={format!r}, expected one of {', '.join(FORMATS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not isinstance(model, LGViT):
        raise ValueError(f"model is a {type(model).__name__}, expected an LGViT")
    if model.training:
        raise RuntimeError("export needs eval mode: call model.eval() first")
    for index, head in enumerate(model.exit_heads):
        kind = type(getattr(head, "perception", head))
        if type(head) is not ExitHead or kind not in _HEADS:
            known = ", ".join(known.__name__ for known in _HEADS)
            raise ValueError(
                f"exit {index + 1} has a head of type {kind.__name__}, which export does not know;"
                f" it knows {known}"
            )
    if any(isinstance(module, PackedLinear) for module in model.backbone.modules()):
        raise ValueError("the model is packed for inference: export it before `pack_`")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"{name} is {parameter.dtype} on {parameter.device}, export wants float32 on the CPU:"
                " model.float().cpu()"
            )


def _onnx() -> Any:
    """The onnx package, once what the exporter needs is there."""
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter is built on it
    except ImportError as error:
        raise RuntimeError(
            f"{error.name} is not installed, which export needs: pip install onnx onnxscript"
        ) from None
    return onnx


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
    model: LGViT, spec: InputSpec, files: Sequence[SegmentFile], onnx_version: str
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
        opset=OPSET,
        segments=tuple(files),
        made_with={
            "lgvit_fast": __version__,
            "torch": str(torch.__version__),
            "onnx": onnx_version,
        },
    )
