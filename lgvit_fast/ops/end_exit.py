"""The end of an exit: the answers of the images that leave, and the others packed together.

Everything that follows the decision, in one operation: on a GPU one launch without a wait, that a CUDA
graph can hold. The moves are those of `compact_`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lgvit_fast import _extension
from lgvit_fast.exit_rules import ExitStep
from lgvit_fast.ops.compact import MAX_CUDA_ROWS, compact_
from lgvit_fast.ops.dispatch import Backend, Op

__all__ = ["Counts", "Waiting", "end_exit_", "waiting"]


class Counts(NamedTuple):
    """Where the numbers of images before and after an exit stand, for an exit that nobody waits for.

    Attributes:
        entering: `[1]` int64 on the device: how many rows hold images; those behind are padding,
            which is neither answered nor moved.
        survivors: `[1]` int64: receives how many stay, on the device.
        told: `[1]` int64: receives it too, in pinned memory, for the host to read after an event; None
            where the device is the host.
        scratch: `[1]` int32 on the device, zero before and after; a CUDA device needs it.
    """

    entering: Tensor
    survivors: Tensor
    told: Tensor | None
    scratch: Tensor


class Waiting(NamedTuple):
    """What exits that wait for their count write to; one for all exits of a batch, see `waiting`.

    Attributes:
        told: `[1]` int64 on the host, pinned for a CUDA device: receives how many stay.
        scratch: as of `Counts`; None on the CPU.
    """

    told: Tensor
    scratch: Tensor | None


@torch.compiler.disable
def waiting(device: torch.device) -> Waiting:
    """Memory for the exits of a batch that is on `device`, one after another on one stream."""
    on_gpu = device.type == "cuda"
    told = torch.empty(1, dtype=torch.int64, pin_memory=on_gpu)
    scratch = torch.zeros(1, dtype=torch.int32, device=device) if on_gpu else None
    return Waiting(told, scratch)


@torch.compiler.disable  # the count is read on the host: the one break an exit cannot avoid
def end_exit_(
    step: ExitStep,
    tokens: Tensor,
    rows: Tensor,
    state: Tensor,
    answer: Sequence[Tensor],
    index: int,
    layer: int,
    *,
    into: Tensor | None = None,
    counts: Counts | Waiting | None = None,
    backend: str | None = None,
) -> int | None:
    """Answer the images that leave and pack the others into the first rows, in place.

    The n that stay come to the first n rows of `tokens`, `rows` and `state`, in one order; which
    order is free. Only those at rows >= n move. The rows behind hold nothing of use.

    Args:
        step: the exit's logits `[B, K]` in the dtype of the answer, who leaves, and which are numbers.
        tokens: `[B, ...]`, each row contiguous.
        rows: `[B]` int64, each image's place in the answer.
        state: `[B, ...]`, the policy's.
        answer: logits `[M, K]`, exit index, exit layer and nonfinite `[M]`, as `Inference.tensors()`
            gives them. An image that leaves gets all four; one whose logits are no numbers is flagged,
            whether it leaves or not.
        index: the exit, from 0.
        layer: the block before it, from 1.
        into: `[>= B, ...]` like `tokens`: the survivors' tokens go to its first rows instead.
        counts: without `Counts` the call waits for n and returns it; `Waiting` spares it an allocation.
            With `Counts` nobody waits; rows behind `counts.entering` are padding, and the last row of
            the answer may be written with anything.
        backend: "auto", "cpp" or "torch"; None takes the choice in force.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or what is written shares memory with another
            argument. Raised before anything is written.
        RuntimeError: `backend` is an explicit choice that cannot run.
    """
    if step.logits.dtype != answer[0].dtype:
        step = step._replace(logits=step.logits.to(answer[0].dtype))
    call = _Call(step, tokens, rows, state, answer, (index, layer), into, counts)
    return _end_exit(step.logits, call, backend=backend)


class _Call(NamedTuple):
    """The arguments of `end_exit_`, logits in the dtype of the answer; `place` is index and layer."""

    step: ExitStep
    tokens: Tensor
    rows: Tensor
    state: Tensor
    answer: Sequence[Tensor]
    place: tuple[int, int]
    into: Tensor | None
    counts: Counts | Waiting | None


def _run_cpp(logits: Tensor, call: _Call) -> int | None:
    counts = waiting(logits.device) if call.counts is None else call.counts
    if isinstance(counts, Counts):
        entering, written = counts.entering, [counts.survivors]
        written += [] if counts.told is None else [counts.told]
    else:
        entering, written = None, [counts.told]
    torch.ops.lgvit_fast.end_exit_(
        *(*call.step, call.tokens, call.into, call.rows, call.state, list(call.answer)),
        *(entering, written, counts.scratch, *call.place),
    )
    if isinstance(counts, Counts):
        return None
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()
    return int(counts.told)


def _run_torch(logits: Tensor, call: _Call) -> int | None:
    """The reference: what every backend is compared with."""
    if not isinstance(call.counts, Counts):
        return _with_wait(call)
    _without_wait(call, call.counts)
    return None


def _with_wait(call: _Call) -> int:
    step, rows = call.step, call.rows
    _answer(call, rows[step.leave], step.logits[step.leave], rows[~step.valid])
    n: int = compact_(call.tokens, ~step.leave, rows, call.state, backend="torch")
    if call.into is not None:
        call.into[:n] = call.tokens[:n]
    return n


def _without_wait(call: _Call, counts: Counts) -> None:
    """With sizes that do not depend on the values, so that a graph can hold it."""
    step, rows, state = call.step, call.rows, call.state
    spare = len(call.answer[0]) - 1  # written by all that must write nothing
    places = torch.arange(len(rows), device=rows.device)
    real = places < counts.entering
    leavers = torch.where(real & step.leave, rows, spare)
    _answer(call, leavers, step.logits, torch.where(real & ~step.valid, rows, spare))

    keep = real & ~step.leave
    kept = keep.cumsum(0)
    count = kept[-1]
    to = torch.where(keep, kept - 1, count + places - kept)
    order = torch.empty_like(places).scatter_(0, to, places)  # survivors first
    moved = call.tokens[order]
    (call.tokens if call.into is None else call.into[: len(rows)]).copy_(moved)
    rows.copy_(rows[order])
    state.copy_(state[order])
    counts.survivors.copy_(count)
    if counts.told is not None:
        counts.told.copy_(count, non_blocking=True)


def _answer(call: _Call, leavers: Tensor, logits: Tensor, invalid: Tensor) -> None:
    """Write the answers of those that leave, and flag those whose logits are no numbers."""
    answer_logits, exit_index, exit_layer, nonfinite = call.answer
    answer_logits.index_copy_(0, leavers, logits)
    exit_index.index_fill_(0, leavers, call.place[0])
    exit_layer.index_fill_(0, leavers, call.place[1])
    nonfinite.index_fill_(0, invalid, True)


def _refuse_cpp(logits: Tensor, call: _Call) -> str | None:
    if logits.is_cuda and len(call.rows) > MAX_CUDA_ROWS:
        return f"the CUDA kernel takes at most {MAX_CUDA_ROWS} rows"
    if torch.is_grad_enabled() and (call.tokens.requires_grad or logits.requires_grad):
        return "it has no gradient, and a tensor requires one"
    return None


if _extension.why_compact_missing() is None:

    @torch.library.register_fake("lgvit_fast::end_exit_")
    def _(*args: object) -> None:
        return None


_end_exit = Op(
    "end_exit_",
    Backend("cpp", _run_cpp, _extension.why_compact_missing, _refuse_cpp),
    Backend("torch", _run_torch),
)
