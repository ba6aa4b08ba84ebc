"""The exit step: pooled vectors and prefix tokens to logits, statistics and the exit decision.

Everything after a head's pooling is affine and folds into one matrix, so an exit ends in one small
product on `[B, ...]`, the softmax statistics of its rows and a rule that says who leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lgvit_fast.exit_rules import ExitRule, ExitStep, RuleKind
from lgvit_fast.ops import _cpp, _triton
from lgvit_fast.ops.checks import check_memory, check_vector
from lgvit_fast.ops.dispatch import Backend, Op

__all__ = ["ExitRule", "ExitStep", "RuleKind", "apply_rule", "exit_step", "exit_step_reference"]


def apply_rule(rule: ExitRule, logits: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decide who leaves; updates `state` in place.

    Args:
        rule: the exit's rule; comparisons are strict.
        logits: `[B, K]`.
        state: `[B, 2]` int32, per image: length of the current run, last predicted class.

    Returns:
        `(leave, valid)`, each `[B]` bool. An image with a NaN or +inf logit is not valid, never
        leaves and starts its run anew. `0 log 0` counts as 0 in the entropy.
    """
    probabilities = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    confidence, prediction = probabilities.max(dim=-1)
    valid = ~confidence.isnan()
    if rule.kind == RuleKind.CONFIDENCE:
        return confidence > rule.threshold, valid
    if rule.kind == RuleKind.NEVER:
        return torch.zeros_like(valid), valid
    run, last = state.unbind(1)
    if rule.kind == RuleKind.PATIENCE:
        run.copy_(torch.where(valid, torch.where(prediction == last, run + 1, 1), 0))
        last.copy_(torch.where(valid, prediction, -1))
        return run >= rule.patience, valid
    sure = torch.special.entr(probabilities).sum(-1) < rule.threshold
    if rule.kind == RuleKind.ENTROPY:
        return sure, valid
    run.copy_(torch.where(sure, run + 1, 0))
    return run >= rule.patience, valid


def exit_step_reference(
    pooled: Tensor,
    tokens: Tensor,
    num_class_tokens: int,
    weight: Tensor,
    bias: Tensor,
    rule: ExitRule,
    state: Tensor,
) -> ExitStep:
    """`exit_step` in plain PyTorch: the definition every backend is compared with."""
    vectors = pooled.flatten(1).to(weight.dtype)
    if num_class_tokens:
        class_tokens = tokens[:, :num_class_tokens].flatten(1).to(weight.dtype)
        vectors = torch.cat((vectors, class_tokens), dim=1)
    logits = F.linear(vectors, weight, bias.to(weight.dtype))
    return ExitStep(logits, *apply_rule(rule, logits, state))


def _exit_step_triton(
    pooled: Tensor,
    tokens: Tensor,
    num_class_tokens: int,
    weight: Tensor,
    bias: Tensor,
    rule: ExitRule,
    state: Tensor,
) -> ExitStep:
    numbers = (int(rule.kind), float(rule.threshold), rule.patience)
    return ExitStep(
        *_triton.exit_step(pooled, tokens, num_class_tokens, weight, bias, *numbers, state)
    )


def _refuse_triton(
    pooled: Tensor, tokens: Tensor, count: int, weight: Tensor, *args: object
) -> str | None:
    return _triton.refuse(pooled, tokens, weight)


def _exit_step_cpp(
    pooled: Tensor,
    tokens: Tensor,
    num_class_tokens: int,
    weight: Tensor,
    bias: Tensor,
    rule: ExitRule,
    state: Tensor,
) -> ExitStep:
    op = torch.ops.lgvit_fast.exit_step_cpp
    return ExitStep(*op(pooled, tokens, num_class_tokens, weight, bias, *rule, state))


def _refuse_cpp(
    pooled: Tensor, tokens: Tensor, count: int, weight: Tensor, bias: Tensor, *args: object
) -> str | None:
    return _cpp.refuse(pooled, tokens, weight, bias)


_op = Op(
    "exit_step",
    Backend("triton", _exit_step_triton, _triton.why_missing, _refuse_triton),
    Backend("cpp", _exit_step_cpp, _cpp.why_missing, _refuse_cpp),
    Backend("torch", exit_step_reference),
)


def exit_step(
    pooled: Tensor,
    tokens: Tensor,
    num_class_tokens: int,
    weight: Tensor,
    bias: Tensor,
    rule: ExitRule,
    state: Tensor,
    *,
    backend: str | None = None,
) -> ExitStep:
    """Logits of an exit and its decision.

    Args:
        pooled: `[B, M, C]` from `lph_pool` or `gah_pool`.
        tokens: `[B, P + N, C]`; its first `num_class_tokens` rows are read.
        num_class_tokens: T, the class tokens the classifier sees: 0, 1 (cls) or 2 (cls, dist).
        weight: `[K, (M + T) * C]`, compute dtype.
        bias: `[K]`.
        rule: the exit's rule.
        state: `[B, 2]` int32, contiguous rows, updated in place (see `apply_rule`).
        backend: one of `lgvit_fast.ops.CHOICES` for this call only.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
        RuntimeError: the backend asked for cannot run here.
    """
    _check(pooled, tokens, num_class_tokens, weight, bias, rule, state)
    return _op(pooled, tokens, num_class_tokens, weight, bias, rule, state, backend=backend)


def _check(
    pooled: Tensor,
    tokens: Tensor,
    num_class_tokens: int,
    weight: Tensor,
    bias: Tensor,
    rule: ExitRule,
    state: Tensor,
) -> None:
    shapes = f"pooled {tuple(pooled.shape)}, tokens {tuple(tokens.shape)}"
    if pooled.dim() != 3 or tokens.dim() != 3 or pooled.shape[2] < 1:
        raise ValueError(f"exit_step: {shapes}, expected [B, M, C] and [B, P + N, C], C > 0")
    batch, vectors, width = pooled.shape
    if tokens.shape[0] != batch or tokens.shape[2] != width or tuple(state.shape) != (batch, 2):
        raise ValueError(
            f"exit_step: {shapes} and state {tuple(state.shape)} do not describe the same images"
        )
    if not 0 <= num_class_tokens <= tokens.shape[1]:
        raise ValueError(
            f"exit_step: num_class_tokens={num_class_tokens}, expected 0 to {tokens.shape[1]},"
            " the rows of tokens"
        )
    columns = (vectors + num_class_tokens) * width
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != columns:
        raise ValueError(
            f"exit_step: weight has shape {tuple(weight.shape)}, expected [K, {columns}]"
            f" for pooled {tuple(pooled.shape)} and {num_class_tokens} class tokens"
        )
    check_vector("exit_step", "bias", bias, (weight.shape[0],), pooled)
    for name, tensor in (("pooled", pooled), ("tokens", tokens), ("weight", weight)):
        check_vector("exit_step", name, tensor, tuple(tensor.shape), pooled)
    if state.dtype != torch.int32 or state.device != pooled.device:
        raise ValueError(
            f"exit_step: state is {state.dtype} on {state.device},"
            f" expected torch.int32 on {pooled.device}"
        )
    if batch and (state.stride(1) != 1 or (batch > 1 and state.stride(0) < 2)):
        raise ValueError(f"exit_step: state has strides {state.stride()}, expected contiguous rows")
    if rule.kind not in tuple(RuleKind):
        raise ValueError(f"exit_step: rule has kind {rule.kind!r}, expected a RuleKind")
    if rule.kind in (RuleKind.PATIENCE, RuleKind.PATIENT_CONFIDENT) and rule.patience < 1:
        raise ValueError(f"exit_step: rule has patience {rule.patience}, expected at least 1")
    check_memory("exit_step", pooled=pooled, tokens=tokens, weight=weight, bias=bias, state=state)
