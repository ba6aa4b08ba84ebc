"""The CUDA kernels on the host, called with torch's CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lgvit_fast.ops.lph import LPHWeights
from tests.cuda_host.build import FAULTS

ORDERS = ("forward", "reverse", "shuffled", "interleaved")
_Pointer = ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = [("data", _Pointer), ("stride", ctypes.c_int64), ("bytes", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor: Tensor | None) -> _Rows:
        if tensor is None:
            return cls(None, 0, 0)
        row = tensor.shape[1:].numel() * tensor.itemsize
        return cls(tensor.data_ptr(), tensor.stride(0) * tensor.itemsize, row)


class _EndExit(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("entering", _Pointer),
        ("leave", _Pointer),
        ("valid", _Pointer),
        ("rows", _Pointer),
        ("logits", _Rows),
        ("answer_logits", _Rows),
        ("answers", ctypes.c_int64),
        ("exit_index", _Pointer),
        ("exit_layer", _Pointer),
        ("nonfinite", _Pointer),
        ("index", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("tokens", _Rows),
        ("into", _Rows),
        ("state", _Rows),
        ("counts", _Pointer * 2),
        ("finished", _Pointer),
    ]


class _Map(ctypes.Structure):
    _fields_ = [("data", _Pointer), ("image", ctypes.c_int64), ("token", ctypes.c_int64)]

    @classmethod
    def of(cls, tokens: Tensor) -> _Map:
        return cls(tokens.data_ptr(), *tokens.stride()[:2])


class _LphTail(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("hidden", _Map),
        ("tokens", _Map),
        ("bias", _Pointer),
        ("scale", _Pointer),
        ("shift", _Pointer),
        ("taps", _Pointer),
        ("depthwise_bias", _Pointer),
        ("pooled", _Pointer),
        ("batch", ctypes.c_int64),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("channels", ctypes.c_int),
    ]


_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # lgvit::Scalar


class HostKernels:
    """The library that `build` compiled."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.problem.restype = ctypes.c_char_p
        self._library.set_schedule.argtypes = (ctypes.c_int, ctypes.c_uint64, ctypes.c_int)

    def schedule(self, order: str, seed: int = 0, resident: int = 4) -> None:
        """How the blocks of the next launches run: one of `ORDERS`."""
        self._library.set_schedule(ORDERS.index(order), seed, resident)

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """Inside, the kernels have one of `FAULTS`."""
        self._library.set_fault(1 + list(FAULTS).index(name))
        try:
            yield
        finally:
            self._library.set_fault(0)

    def compact(
        self, tensors: Sequence[Tensor], keep: Tensor, count: Tensor, multiprocessors: int
    ) -> None:
        """csrc/stable/cuda/compact_kernel.cu, for at most 16 tensors."""
        rows = (_Rows * len(tensors))(*map(_Rows.of, tensors))
        self._check(
            self._library.compact(
                rows,
                len(tensors),
                _Pointer(keep.data_ptr()),
                ctypes.c_int64(keep.stride(0)),
                len(keep),
                _Pointer(count.data_ptr()),
                multiprocessors,
            )
        )

    def end_exit(
        self,
        logits: Tensor,
        leave: Tensor,
        valid: Tensor,
        tokens: Tensor,
        into: Tensor | None,
        rows: Tensor,
        state: Tensor,
        answer: Sequence[Tensor],
        entering: Tensor | None,
        counts: Sequence[Tensor],
        scratch: Tensor,
        index: int,
        layer: int,
        multiprocessors: int,
    ) -> None:
        """csrc/stable/cuda/end_exit_kernel.cu, with the operator's arguments."""
        pointers = [count.data_ptr() for count in counts] + [None] * (2 - len(counts))
        arguments = _EndExit(
            len(leave),
            None if entering is None else entering.data_ptr(),
            leave.data_ptr(),
            valid.data_ptr(),
            rows.data_ptr(),
            _Rows.of(logits),
            _Rows.of(answer[0]),
            len(answer[1]),
            *(part.data_ptr() for part in answer[1:]),
            index,
            layer,
            _Rows.of(tokens),
            _Rows.of(into),
            _Rows.of(state),
            (_Pointer * 2)(*pointers),
            scratch.data_ptr(),
        )
        self._check(self._library.end_exit(ctypes.byref(arguments), multiprocessors))

    def lph_tail(
        self,
        hidden: Tensor,
        tokens: Tensor,
        patch_grid: tuple[int, int],
        weights: LPHWeights,
        pooled: Tensor,
        multiprocessors: int,
    ) -> None:
        """csrc/stable/cuda/lph_tail_kernel.cu on patches `[B, N, C]`, with the weights' vectors."""
        arguments = _LphTail(
            _TYPES.index(tokens.dtype),
            _Map.of(hidden),
            _Map.of(tokens),
            *(None if vector is None else vector.data_ptr() for vector in weights[1:]),
            pooled.data_ptr(),
            len(tokens),
            *patch_grid,
            tokens.shape[2],
        )
        self._check(self._library.lph_tail(ctypes.byref(arguments), multiprocessors))

    def half_phi(self, x: Tensor) -> Tensor:
        """The kernel's normal distribution function for 16-bit types, of float32 numbers."""
        out = torch.empty_like(x)
        pointers = (_Pointer(x.data_ptr()), _Pointer(out.data_ptr()))
        self._library.half_phi(*pointers, ctypes.c_int64(len(x)))
        return out

    def _check(self, error: int) -> None:
        if error:
            raise RuntimeError(self._library.problem().decode())
