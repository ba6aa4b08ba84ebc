"""ONNX files from strangers: a walk over the protobuf that finds tensors kept in other files.

An ONNX tensor may name a file that holds its values. A runtime would open whatever is named there, so
a graph with such a tensor is refused before a runtime sees it. Exported graphs hold their weights
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["check_onnx"]

# Numbers of the fields (onnx.proto) that lead to tensors, and the kind of message each holds.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a tensor
_DEEPEST = 32


def check_onnx(data: bytes) -> None:
    """Raise ValueError unless `data` is a protobuf message without tensors in other files."""
    _check(memoryview(data), "model", 0)


def _check(message: memoryview, kind: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"graphs are nested more than {_DEEPEST} deep")
    inner = _FIELDS[kind]
    for number, value in _fields(message):
        if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value)):
            raise ValueError("a tensor is kept in another file, which an exported graph never does")
        if number in inner:
            if not isinstance(value, memoryview):
                raise ValueError(f"field {number} of a {kind} is no message")
            _check(value, inner[number], depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field; fixed-size values are given as bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(message, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"it is no protobuf message: wire type {wire}")
        if place + size > len(message):
            raise ValueError("it is no whole protobuf message: it ends inside a field")
        yield number, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 64:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError("it is no whole protobuf message: it ends inside a number")
