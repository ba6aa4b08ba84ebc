"""A graph that names other files is refused; what is no ONNX file is noticed."""

import numpy as np
import pytest

from lgvit_fast.deploy.onnx_file import check_onnx

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def tensor(external=False):
    made = numpy_helper.from_array(np.arange(40, dtype=np.float32), "w")
    if external:
        onnx.external_data_helper.set_external_data(made, "../../etc/passwd")
    return made


def graph(nodes=(), initializers=()):
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 40])
    return helper.make_graph(list(nodes), "g", [value], [value], list(initializers))


def constant(value):
    return helper.make_node("Constant", [], ["y"], value=value)


def branch(value):
    return helper.make_node("If", ["c"], ["z"], then_branch=graph([constant(value)]))


def sparse(value):
    indices = numpy_helper.from_array(np.arange(40, dtype=np.int64))
    return helper.make_sparse_tensor(value, indices, [100])


def model(part, **options):
    return helper.make_model(part, **options)


def with_sparse(value):
    made = graph()
    made.sparse_initializer.append(sparse(value))
    return model(made)


def with_function(value):
    opset = helper.make_opsetid("", 20)
    function = helper.make_function("d", "f", [], ["y"], [constant(value)], [opset])
    return model(graph(), functions=[function])


PLACES = {
    "initializer": lambda value: model(graph(initializers=[value])),
    "attribute": lambda value: model(graph([constant(value)])),
    "branch": lambda value: model(graph([branch(value)])),
    "sparse": with_sparse,
    "function": with_function,
}


@pytest.mark.parametrize("place", PLACES)
def test_tensors_in_other_files_are_refused(place):
    check_onnx(PLACES[place](tensor()).SerializeToString())
    with pytest.raises(ValueError, match="kept in another file"):
        check_onnx(PLACES[place](tensor(external=True)).SerializeToString())


def test_truncated():
    data = PLACES["initializer"](tensor()).SerializeToString()
    for cut in (1, 7, 100):
        with pytest.raises(ValueError, match="ends inside"):
            check_onnx(data[:-cut])


@pytest.mark.parametrize(
    "data", [b"\x80" * 30, b"PK\x03\x04" + bytes(30), b"\x3a\x05hello", b"\x38\x01"]
)
def test_other_bytes(data):
    with pytest.raises(ValueError, match=r"protobuf|ends inside|no message"):
        check_onnx(data)


def test_endless_nesting():
    content = b""
    for _ in range(20):  # a graph in an attribute of a node of a graph, and so on
        for number in (6, 5, 1):
            content = field(number, content)
    with pytest.raises(ValueError, match="nested"):
        check_onnx(field(7, content))


def field(number, content):
    """A field of a protobuf message; of less than 16 kB."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + content
