"""ONNX Runtime, OpenVINO and ExecuTorch behind one interface: a file in, functions of arrays out."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FORMATS",
    "LOADERS",
    "METHOD",
    "RUNTIMES",
    "Graph",
    "SegmentOutput",
    "load_runtime",
    "openvino_core",
    "why_missing",
]

METHOD = "segment_{}"  # the methods of an ExecuTorch program


# What a runtime makes of a graph: a function to its outputs, their names, and the input's shape.
_Loaded = tuple[Callable[[NDArray[np.float32]], Any], list[str], tuple[int | None, ...]]


class SegmentOutput(NamedTuple):
    """What a graph gives of n images. The fields are the names of the graph's outputs."""

    logits: NDArray[np.float32]  # [n, K]
    confidence: NDArray[np.float32]  # [n], largest softmax probability
    entropy: NDArray[np.float32]  # [n], of the softmax, in nats
    prediction: NDArray[np.int64]  # [n], class of the largest logit
    valid: NDArray[np.bool_]  # [n], False where the softmax is not a number
    tokens: NDArray[np.float32] | None = None  # [n, ...], input of the next graph; not of the last


class Graph(NamedTuple):
    """A graph ready to run.

    Attributes:
        run: images or tokens `[n, ...]`, n >= 1, float32 and contiguous, to its outputs. These may be
            overwritten by the next call.
        shape: of an input without the batch; None where a size is not fixed.
    """

    run: Callable[[NDArray[np.float32]], SegmentOutput]
    shape: tuple[int | None, ...]


def why_missing(runtime: str) -> str | None:
    """Why a runtime cannot be used, with the command that installs it; None if it can."""
    needed = (runtime, "torch") if runtime == "executorch" else (runtime,)
    for package in needed:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {package}"
    return None


def load_runtime(
    runtime: str, threads: int | None, format: str = "onnx", precision: str = "float32"
) -> tuple[str, Callable[[bytes], list[Graph]]]:
    """The name of the runtime chosen, and what makes the graphs of a file ready on it.

    Args:
        runtime: one that runs `format`, or "auto" for the first of these that is installed; for int8
            the last, for ONNX Runtime would compute int8 weights in float32.
        threads: for one graph; None takes every processor this process may use.
        format: of the files, one of `FORMATS`.
        precision: of the graphs.

    Raises:
        ValueError: an unknown runtime, one that does not run this format, or no thread.
        RuntimeError: it is not installed; the message names the command that installs it.
    """
    runtimes = FORMATS[format]
    if runtime not in ("auto", *runtimes):
        *others, last = ("auto", *runtimes)
        raise ValueError(
            f"runtime={runtime!r}, expected {', '.join(others)} or {last}:"
            f" the export's format is {format!r}"
        )
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise ValueError(f"threads={threads!r}, expected at least 1, or None for all processors")
    order = runtimes if precision == "float32" else runtimes[::-1]
    missing = {name: why_missing(name) for name in order if runtime in ("auto", name)}
    found = next((name for name, reason in missing.items() if reason is None), None)
    if found is None:
        raise RuntimeError(" or ".join(filter(None, missing.values())))
    count = threads or len(os.sched_getaffinity(0))
    if format == "executorch":
        load_all = _executorch(count)
    else:
        load = LOADERS[found](count)

        def load_all(data: bytes) -> list[_Loaded]:
            return [load(data)]

    return found, lambda data: [_graph(*loaded) for loaded in load_all(data)]


def _graph(
    run: Callable[[NDArray[np.float32]], Any], names: list[str], shape: tuple[int | None, ...]
) -> Graph:
    return Graph(lambda x: SegmentOutput(**dict(zip(names, run(x), strict=True))), shape)


def _onnxruntime(threads: int, alone: bool = False) -> Callable[[bytes], _Loaded]:
    import onnxruntime

    _share_memory()
    version = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    knows_duration = version >= (1, 26)  # older ones ignore it, and spin while another graph works

    def load(data: bytes) -> _Loaded:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Long enough for the next operator, not for the next graph, whose own threads work then. To
        # sleep between operators costs a tenth of a small model's time.
        if not alone:
            spin = ("spin_duration_us", "20") if knows_duration else ("allow_spinning", "0")
            options.add_session_config_entry(f"session.intra_op.{spin[0]}", spin[1])
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Where only weights are int8 they become float32 now; else each call would do that anew.
        fuse = b"QuantizeLinear" in data
        options.add_session_config_entry("session.disable_quant_qdq", "0" if fuse else "1")
        options.log_severity_level = 3  # errors come as exceptions
        session = onnxruntime.InferenceSession(
            data, sess_options=options, providers=["CPUExecutionProvider"]
        )
        (entry,) = session.get_inputs()
        names = [output.name for output in session.get_outputs()]
        shape = tuple(size if isinstance(size, int) else None for size in entry.shape[1:])
        # Neither way copies: arrays in are read in place, arrays out are the session's own memory.
        return (lambda x: session.run(None, {entry.name: x})), names, shape

    return load


@cache
def _share_memory() -> None:
    """Let all graphs of the process that ask for it take activations from one pool.

    Each would keep a pool of its own otherwise, as large as its largest batch, though one graph works
    at a time.
    """
    import onnxruntime

    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    pool = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(pool, None)


def _openvino(threads: int, alone: bool = False) -> Callable[[bytes], _Loaded]:
    import openvino
    from openvino import properties
    from openvino.properties import hint

    core = openvino_core()
    settings: dict[Any, Any] = {
        hint.performance_mode: hint.PerformanceMode.LATENCY,
        hint.inference_precision: openvino.Type.f32,  # else bfloat16 where the processor has it
        properties.num_streams: 1,
        properties.inference_num_threads: threads,
    }

    def load(data: bytes) -> _Loaded:
        model = core.read_model(model=data)
        compiled = core.compile_model(model, "CPU", settings | _row_scales(model))
        request = compiled.create_infer_request()
        names = [output.get_any_name() for output in compiled.outputs]

        def run(x: NDArray[np.float32]) -> list[Any]:
            # OpenVINO shares no memory that it may not write to.
            shared = openvino.Tensor(x if x.flags.writeable else x.copy(), shared_memory=True)
            request.set_input_tensor(shared)
            request.infer(share_outputs=True)
            return [request.get_output_tensor(index).data for index in range(len(names))]

        sizes = list(compiled.input(0).get_partial_shape())[1:]
        return run, names, tuple(d.get_length() if d.is_static else None for d in sizes)

    return load


def _executorch(threads: int) -> Callable[[bytes], list[_Loaded]]:
    import torch  # whose tensors the Python package of ExecuTorch takes and gives
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Program, Runtime

    _unsafe_reset_threadpool(threads)  # one pool for the whole process

    def ready(program: Program, name: str) -> _Loaded:
        about = program.metadata(name)
        largest, *shape = about.input_tensor_meta(0).sizes()
        names = list(SegmentOutput._fields[: about.num_outputs()])
        program.load_method(name)

        def run(x: NDArray[np.float32]) -> list[Any]:
            method = program.load_method(name)  # the one loaded above; it reads the program's bytes
            parts = [
                method.execute([torch.from_numpy(x[start : start + largest])])
                for start in range(0, len(x), largest)
            ]
            return [torch.cat(output).numpy() for output in zip(*parts, strict=True)]

        return run, names, tuple(shape)

    def load(data: bytes) -> list[_Loaded]:
        program = Runtime.get().load_program(data)
        methods = (METHOD.format(index) for index in range(len(program.method_names)))
        return [ready(program, name) for name in methods]

    return load


@cache
def openvino_core() -> Any:
    """One for the process, and for as long as it lives.

    Each core sets an alternate signal stack, and brings back the one before when it goes. Of two that
    go in the order they came, the second brings back memory that the first has freed: the next signal
    kills the process.
    """
    import openvino

    return openvino.Core()


def _row_scales(model: Any) -> dict[Any, Any]:
    """The setting under which OpenVINO multiplies in int8: how many values of a row share a scale.

    Where the processor cannot, OpenVINO computes in float32 instead. The number has to divide the rows
    of every matrix, else that matrix stays in float32; the more share a scale, the faster.
    """
    from openvino.properties import hint

    lengths = [
        node.input_value(0).get_partial_shape()[-1].get_length()
        for node in model.get_ops()
        if node.get_type_name() == "MatMul" and _is_int8(node.input_value(1).get_node())
    ]
    return {hint.dynamic_quantization_group_size: math.gcd(*lengths)} if lengths else {}


def _is_int8(node: Any) -> bool:
    """Whether a node is an int8 constant times a scale, in any of the forms a reader gives it."""
    for _ in range(4):
        if node.get_type_name() == "Constant":
            return bool(node.get_element_type().get_type_name() == "i8")
        if not node.get_input_size():
            return False
        node = node.input_value(0).get_node()
    return False


# From a number of threads, and whether a graph has the process to itself, to what loads the bytes of
# any ONNX graph; see `load_runtime` for the order.
LOADERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
RUNTIMES = tuple(LOADERS)
FORMATS = {"onnx": RUNTIMES, "executorch": ("executorch",)}  # of an export, and what runs them
