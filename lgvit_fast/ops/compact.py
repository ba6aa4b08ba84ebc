"""Batch compaction: after an exit decision, the images that stay move to the front of the batch."""

from itertools import combinations

import torch
from torch import Tensor

from lgvit_fast import _extension
from lgvit_fast.ops.checks import check_memory
from lgvit_fast.ops.dispatch import Backend, Op

__all__ = ["compact_"]

MAX_CUDA_ROWS = 8192  # kMaxRows of csrc/stable/cuda/rows.h


@torch.compiler.disable  # the count is read on the host: the one break an exit cannot avoid
def compact_(
    tokens: Tensor,
    keep: Tensor,
    *companions: Tensor,
    stable: bool = False,
    backend: str | None = None,
) -> int:
    """Moves the rows that stay to the front, in place, and returns their number n.

    The first n rows of `tokens` and of every companion become the survivors, in one order for all.
    The order is free: only the survivors at rows >= n move, each into a hole at a row < n, the
    fewest bytes that any compaction can move. Rows from n on are left over and hold nothing of use.

    On the GPU this waits once, for n. `torch.ops.lgvit_fast.compact_` is the same without the wait,
    fit for a CUDA graph: it writes n where the caller says.

    Args:
        tokens: `[B, ...]`, any dtype. Rows may be strided, but each must be contiguous.
        keep: `[B]` bool, true for the rows that stay; only read.
        *companions: More tensors `[B, ...]` whose rows travel along (image index, policy state).
        stable: Keep the survivors in their order; moves nearly all of them.
        backend: "auto", "cpp" or "torch"; None takes the choice in force.

    Returns:
        The number of survivors.

    Raises:
        ValueError: `keep` is not bool `[B]`, a tensor has another length or device or rows that are
            not contiguous, two rows share memory, or a storage was resized. Raised before anything
            is moved.
        RuntimeError: `backend` is an explicit choice that cannot run.
    """
    tensors = (tokens, *companions)
    _check(tensors, keep)
    return _compact(keep, tensors, stable, backend=backend)


def _check(tensors: tuple[Tensor, ...], keep: Tensor) -> None:
    if keep.dtype != torch.bool or keep.dim() != 1:
        raise ValueError(f"keep must be bool [B], got {keep.dtype} {list(keep.shape)}")
    for i, tensor in enumerate(tensors):
        if tensor.dim() == 0 or tensor.shape[0] != keep.shape[0]:
            raise ValueError(
                f"{_name(i)} has shape {list(tensor.shape)}, expected [{keep.shape[0]}, ...] as keep"
            )
        if tensor.device != keep.device:
            raise ValueError(f"{_name(i)} is on {tensor.device}, keep on {keep.device}")
        if not _rows_contiguous(tensor):
            raise ValueError(
                f"{_name(i)} has rows that are not contiguous: shape {list(tensor.shape)},"
                f" strides {list(tensor.stride())}"
            )
    check_memory("compact_", keep=keep, **{_name(i): t for i, t in enumerate(tensors)})
    if len(keep) < 2:
        return
    spans = {_name(i): _Span(tensor) for i, tensor in enumerate(tensors)}
    for name, span in spans.items():
        if span.stride < span.width:
            raise ValueError(f"{name} has rows that share memory")
    spans["keep"] = _Span(keep)
    for (name, span), (other_name, other) in combinations(spans.items(), 2):
        if span.meets(other):
            raise ValueError(f"{name} and {other_name} share memory")


def _name(i: int) -> str:
    return "tokens" if i == 0 else f"companion {i}"


def _rows_contiguous(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class _Span:
    """The memory of a tensor [B >= 2, ...] with contiguous rows, in bytes."""

    __slots__ = ("end", "start", "stride", "width")

    def __init__(self, tensor: Tensor) -> None:
        rows = tensor.shape[0]
        self.width = tensor.numel() // rows * tensor.itemsize
        self.stride = tensor.stride(0) * tensor.itemsize
        self.start = tensor.data_ptr()
        self.end = self.start + (rows - 1) * self.stride + self.width

    def meets(self, other: "_Span") -> bool:
        """Whether a byte belongs to both; may say so of different row strides that interlock."""
        if not self.width or not other.width:
            return False
        if self.end <= other.start or other.end <= self.start:
            return False
        if self.stride != other.stride:
            return True
        # Columns of one buffer: apart if each lies beside the other within a row.
        offset = (other.start - self.start) % self.stride
        return not (self.width <= offset <= self.stride - other.width)


def _compact_torch(keep: Tensor, tensors: tuple[Tensor, ...], stable: bool) -> int:
    """The reference: the i-th hole from the front takes the i-th survivor from the back."""
    flags = keep.cpu()  # the one wait for the GPU
    survivors = flags.nonzero().flatten()
    n = len(survivors)
    if stable:
        order = survivors.to(keep.device)
        for tensor in tensors:
            tensor[:n] = tensor[order]
        return n
    holes = (~flags[:n]).nonzero().flatten()
    sources = survivors.flip(0)[: len(holes)]
    if len(holes):
        holes, sources = holes.to(keep.device), sources.to(keep.device)
        for tensor in tensors:
            tensor[holes] = tensor[sources]
    return n


def _compact_cpp(keep: Tensor, tensors: tuple[Tensor, ...], stable: bool) -> int:
    count = torch.empty(1, dtype=torch.int64, pin_memory=keep.is_cuda)
    torch.ops.lgvit_fast.compact_(tensors, keep, count)
    if keep.is_cuda:
        torch.cuda.current_stream(keep.device).synchronize()
    return int(count)


def _refuse_cpp(keep: Tensor, tensors: tuple[Tensor, ...], stable: bool) -> str | None:
    if stable:
        return "it keeps no order, and stable=True asks for it"
    if keep.is_cuda and keep.shape[0] > MAX_CUDA_ROWS:
        return f"the CUDA kernel takes at most {MAX_CUDA_ROWS} rows"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no gradient, and a tensor requires one"
    return None


if _extension.why_compact_missing() is None:

    @torch.library.register_fake("lgvit_fast::compact_")
    def _(tensors: list[Tensor], keep: Tensor, count: Tensor) -> None:
        return None


_compact = Op(
    "compact_",
    Backend("cpp", _compact_cpp, _extension.why_compact_missing, _refuse_cpp),
    Backend("torch", _compact_torch),
)
