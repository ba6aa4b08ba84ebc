"""The program of `export(format="executorch")`: one `.pte` file, a method a segment, for XNNPACK.

ExecuTorch plans memory ahead, so the batch has an upper bound: `MAX_BATCH` images a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lgvit_fast.runtimes.loaders import METHOD, why_missing

__all__ = ["MAX_BATCH", "executorch_version", "to_program"]

MAX_BATCH = 8  # the memory that a phone reserves grows with it


def executorch_version() -> str:
    """The installed version of executorch.

    Raises:
        RuntimeError: it is not installed.
    """
    if reason := why_missing("executorch"):
        raise RuntimeError(f"{reason} (format='executorch' needs it)")
    from executorch.version import __version__

    return str(__version__)


def to_program(graphs: Iterable[tuple[nn.Module, Tensor]]) -> bytes:
    """Lower the graphs of all segments into one program.

    Args:
        graphs: each with an example of its input, two images or more: the exporter takes a batch of
            one for a constant.

    Returns:
        The bytes of a `.pte` file with the methods `segment_0`, `segment_1`, ...
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    programs = {}
    for index, (graph, example) in enumerate(graphs):
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: batch},))
        program = program.run_decompositions({_ATTENTION: _attention})
        _drop_casts(program.graph)
        programs[METHOD.format(index)] = program
    edge = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])
    # Weights in segments of the file of their own, so that they can be mapped rather than copied.
    return bytes(edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True)).buffer)


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as backbones call it, in operators that XNNPACK has.

    Torch's own decomposition guards against rows that are masked everywhere with operators that
    XNNPACK lacks, on `[B, heads, N, N]`: a fifth of the time of a ViT-Ti/16.
    """
    assert not dropout_p and not is_causal and not enable_gqa
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    if attn_mask is not None:
        assert attn_mask.dtype.is_floating_point
        scores = scores + attn_mask
    return scores.softmax(-1) @ v


def _drop_casts(graph: Any) -> None:
    """Means of float32 need no dtype; ExecuTorch's kernel prints a line for each it is given."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.mean.dim:
            assert node.args[0].meta["val"].dtype == torch.float32
            node.kwargs = {}
