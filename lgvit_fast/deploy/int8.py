"""int8 weights in an ONNX graph, with no activation range fixed beforehand and none shared by images.

A matrix `W [K, N]` becomes `round(W / s)` in -127..127 with one scale a column, `s = max|W| / 127`, and
the graph multiplies by `DequantizeLinear` of it: standard ONNX, exact wherever a runtime computes that
product in float. OpenVINO on a processor with VNNI instead rounds each row of the other side (a token)
to 8 bits with scales of that row and multiplies in int8. So an image's answer never depends on the
others in its batch, and nothing has to be known of the images.

Convolutions, products of two activations (attention) and everything between stay in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["quantize"]


def quantize(proto: Any) -> Any:
    """A graph with its weight matrices in int8; of a segment, or of any model.

    Args:
        proto: an ONNX `ModelProto` in float32 that holds its weights, opset 13 or later; unchanged.

    Returns:
        Another one, with the same inputs and outputs.

    Raises:
        ValueError: no weight matrix in it, or one that is not finite.
    """
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
    }
    columns: dict[str, int] = {}  # of each matrix, the axis of its output features
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            columns[node.input[1]] = 0 if transposed else 1
    used_otherwise = {
        name
        for node in graph.node
        for place, name in enumerate(node.input)
        if name in columns and not (node.op_type in ("MatMul", "Gemm") and place == 1)
    }
    nodes = []
    for name in sorted(columns.keys() - used_otherwise):
        axis = columns[name]
        values, scale = _rounded(numpy_helper.to_array(weights[name]), axis, name)
        graph.initializer.remove(weights[name])
        for tensor, suffix in ((values, "int8"), (scale, "scale")):
            graph.initializer.append(numpy_helper.from_array(tensor, f"{name}.{suffix}"))
        inputs = [f"{name}.int8", f"{name}.scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=axis))
    if not nodes:
        raise ValueError(
            "the graph multiplies by no weight matrix, so there is nothing to quantize"
        )
    nodes += graph.node
    graph.ClearField("node")
    graph.node.extend(nodes)
    return made


def _rounded(weight: np.ndarray, axis: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and the float32 scale of each index along `axis`."""
    if not np.isfinite(weight).all():
        raise ValueError(f"the weight {name} holds NaN or infinity")
    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    return np.round(weight / scale).astype(np.int8), scale.ravel().astype(np.float32)
