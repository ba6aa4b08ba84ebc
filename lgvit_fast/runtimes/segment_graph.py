"""A segment as an ONNX graph that holds its weights. The side of `runtimes` that needs torch.

A graph takes the images or the tokens of the segment before it and gives the tokens after its last
block, the exit's logits and what a policy asks of them. Heads are in their exact inference form, so a
graph holds about half of what the published heads compute.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lgvit_fast import ops
from lgvit_fast.heads import ExitHead
from lgvit_fast.heads.gah import GlobalAggregationHead
from lgvit_fast.heads.lph import LocalPerceptionHead
from lgvit_fast.heads.plain import AttentionHead, BlockHead, ConvHead, LinearHead, MLPHead
from lgvit_fast.ops.linear import PackedLinear
from lgvit_fast.policies import NEVER
from lgvit_fast.runtimes.loaders import SegmentOutput
from lgvit_fast.segments import Segment, cut

if TYPE_CHECKING:
    from lgvit_fast.model import LGViT

__all__ = [
    "OPSET",
    "SegmentGraph",
    "check_model",
    "quiet",
    "require_onnx",
    "segment_graphs",
    "segment_modules",
    "to_onnx",
]

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


def segment_modules(
    model: LGViT, image_size: tuple[int, int], asked: Sequence[int] | None = None
) -> Iterator[tuple[SegmentGraph, Tensor]]:
    """The segments of a model in plain PyTorch, shallow to deep, each with an example of its input.

    Args:
        model: one that `check_model` lets pass, in eval mode.
        image_size: `(height, width)` of the images that the segments take, in pixels.
        asked: numbers (from 0, increasing) of the exits to ask; None asks all.
    """
    layers = [spec.layer for spec in model.exits]
    heads = cast(list[ExitHead], list(model.exit_heads))
    places = range(len(layers)) if asked is None else asked
    with torch.no_grad():
        folded = [_folded(head) if i in places else head for i, head in enumerate(heads)]
    # An example of two images: the exporter takes a batch of one for a constant.
    example = torch.zeros(2, model.adapter.in_chans, *image_size)
    for segment in cut(model.adapter, layers, folded, places):
        yield SegmentGraph(segment, image_size).eval(), example
        with torch.no_grad(), ops.backend("torch"):
            example = segment.blocks(example, image_size)


def segment_graphs(
    model: LGViT, image_size: tuple[int, int], asked: Sequence[int] | None = None
) -> Iterator[tuple[Segment, Any]]:
    """The segments of a model, each with its ONNX `ModelProto`, made when asked for.

    Args:
        model: as of `segment_modules`.
        image_size: likewise.
        asked: likewise.

    Raises:
        ValueError: a segment beyond the 2 GB of an ONNX file.
    """
    for graph, example in segment_modules(model, image_size, asked):
        with torch.no_grad(), ops.backend("torch"):
            proto = to_onnx(graph, example)
        yield graph.segment, proto


def check_model(model: LGViT) -> None:
    """Raise ValueError unless the segments of a model can be made graphs: see `lgvit_fast.export`."""
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


def require_onnx() -> Any:
    """The onnx package, once what the exporter needs is there."""
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter is built on it
    except ImportError as error:
        raise RuntimeError(
            f"{error.name} is not installed, which export needs: pip install onnx onnxscript"
        ) from None
    return onnx


class SegmentGraph(nn.Module):
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


def to_onnx(graph: SegmentGraph, example: Tensor) -> Any:
    """A segment as an ONNX `ModelProto` that holds its weights."""
    with quiet():
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
def quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own passes."""
    logger = logging.getLogger("torch")
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
