"""An exit: a head, a readout and classifiers, in the training form and the inference form."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lgvit_fast.heads.gah import GlobalAggregationHead
from lgvit_fast.heads.layout import ExitSpec
from lgvit_fast.heads.lph import LocalPerceptionHead
from lgvit_fast.heads.plain import AttentionHead, BlockHead, ConvHead, LinearHead, MLPHead
from lgvit_fast.heads.readout import ClassReadout, MeanReadout, standard_mean
from lgvit_fast.ops.exit_step import ExitRule, ExitStep, apply_rule, exit_step
from lgvit_fast.watch import Watch

__all__ = ["ExitHead"]


class FoldedHead(NamedTuple):
    """An exit in the exact inference form: the work per token, then one matrix."""

    perception: Any  # weights of `pool`, or of `feature` where the readout has a norm
    weight: Tensor  # [K, (M + T) * C], M vectors of `pool`
    bias: Tensor  # [K]


class ExitHead(nn.Module):
    """Classifies an image from a block's tokens.

    With the mean m of the head's feature over its tokens, the logits are `Wc (m + cls) + bc` for a
    ViT, the mean of two such classifiers on cls and dist for a distilled DeiT, and `Wc m + bc` for a
    model without a class token. Class tokens are the raw ones of the block, no LayerNorm. In a
    hierarchical model m is the mean of the normalised feature. Heads that keep the class tokens
    ("linear", "vit_ee") are read there instead, see `ClassReadout`.

    Args:
        spec: what the exit is made of.
        width: C.
        num_classes: K.
        num_prefix_tokens: P, all tokens before the patches (class, distillation, registers).
        num_class_tokens: T, how many of them the classifiers read: 0, 1 or 2.
        num_heads: attention heads of a head that attends.
        pool: grid pooling of a global head, "subsample" or "average".
        norm: LayerNorm on the head's feature before the mean.

    Attributes:
        perception: the head proper. With `whole` it works on all tokens, else on the patches. If it has
            `fold` and `pool`, these are its exact inference form; `fold_feature` and `feature` are, if
            the readout has a norm.
        readout: its feature to vectors.
        classifiers: one for each vector; their logits are averaged.
        fused: whether there is an inference form of its own rather than the training form.
    """

    def __init__(
        self,
        spec: ExitSpec,
        width: int,
        num_classes: int,
        num_prefix_tokens: int,
        num_class_tokens: int,
        num_heads: int = 8,
        pool: str = "subsample",
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.num_class_tokens = num_class_tokens
        self.perception = _perception(spec, width, num_heads, pool)
        self.whole = getattr(self.perception, "whole", False)
        self.readout: MeanReadout | ClassReadout
        if self.whole and num_class_tokens:
            self.readout = ClassReadout(width, num_class_tokens)
        else:
            self.readout = MeanReadout(width, norm or self.whole)
        form = "pool" if self.readout.affine else "feature"
        self.fused = isinstance(self.readout, MeanReadout) and hasattr(self.perception, form)
        count = max(1, num_class_tokens)
        self.classifiers = _classifiers(count, width, num_classes)
        self.folded: FoldedHead | None = None
        self._watch: Watch | None = None

    def reset_classifiers(self, num_classes: int) -> None:
        """Fresh classifiers for K classes."""
        old = self._linears[0]
        new = _classifiers(len(self.classifiers), old.in_features, num_classes)
        self.classifiers = new.to(old.weight.device, old.weight.dtype)

    @property
    def trained(self) -> bool:
        """Whether the classifiers were ever trained: biases start at zero and do not stay there."""
        return any(bool(linear.bias.any()) for linear in self._linears)

    def start_plain(self) -> None:
        """Make the head transform as little as its form allows, for classifiers fitted to that.

        Its feature becomes the patches (LPH, a transformer block), their averages (heads that attend
        without a residual), or zero (a convolution, a perceptron), by constants in the last layers.
        """
        self.perception.start_plain()

    def forward(self, tokens: Tensor, patch_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Training form: tokens `[B, P + N, C]` to logits `[B, K]` and the feature `[B, n, C]`."""
        return self.answer(self.reduce(tokens, patch_grid), patch_grid)

    def reduce(self, tokens: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """All that the exit reads of tokens `[B, P + N, C]`: fewer patches under a global head."""
        if not isinstance(self.perception, GlobalAggregationHead):
            return tokens
        prefix, patches = tokens.tensor_split((self.num_prefix_tokens,), dim=1)
        return torch.cat((prefix, self.perception.reduce(patches, patch_grid)), dim=1)

    def answer(self, tokens: Tensor, patch_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The rest of `forward`: reduced tokens to logits `[B, K]` and the feature `[B, n, C]`."""
        vectors, feature = self.vectors(tokens, patch_grid)
        logits = [classify(v) for classify, v in zip(self.classifiers, vectors, strict=True)]
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0], feature

    def vectors(
        self, tokens: Tensor, patch_grid: tuple[int, int]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What each classifier reads, `[B, C]`, and the feature `[B, n, C]`, of reduced tokens."""
        prefix = self.num_prefix_tokens
        if self.whole:
            tokens = self.perception(tokens, patch_grid)
            feature = tokens[:, prefix:]
        elif isinstance(self.perception, GlobalAggregationHead):
            feature = self.perception.attend(tokens[:, prefix:])
        else:
            feature = self.perception(tokens[:, prefix:], patch_grid)
        return self.readout(feature, tokens[:, : self.num_class_tokens]), feature

    def step(
        self, tokens: Tensor, patch_grid: tuple[int, int], rule: ExitRule, state: Tensor
    ) -> ExitStep:
        """Inference form: logits of every image and who leaves under `rule`.

        `prepare` must have been called since the parameters last changed.

        Args:
            tokens: `[B, P + N, C]`.
            patch_grid: `(H, W)`.
            rule: the policy's rule at this exit.
            state: `[B, 2]` int32 policy state, updated in place.
        """
        return self.decide(self.read(tokens, patch_grid), tokens, rule, state)

    def read(self, tokens: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """The part of `step` without rule and state, which can be compiled.

        Returns:
            The pooled vectors `[B, M, C]` of the inference form; logits `[B, K]` of a head without.
        """
        if not self.fused:
            logits, _ = self(tokens, patch_grid)
            return logits  # type: ignore[no-any-return]
        folded = self._prepared
        tokens = tokens.to(folded.weight.dtype)
        pooled: Tensor
        if self.readout.affine:
            pooled = self.perception.pool(
                tokens, patch_grid, self.num_prefix_tokens, folded.perception
            )
            return pooled
        patches = tokens[:, self.num_prefix_tokens :]
        feature = self.perception.feature(patches, patch_grid, folded.perception)
        return standard_mean(feature, self._norm.eps)

    def decide(self, read: Tensor, tokens: Tensor, rule: ExitRule, state: Tensor) -> ExitStep:
        """The rest of `step`: logits and who leaves, from what `read` gave of these tokens."""
        if not self.fused:
            return ExitStep(read, *apply_rule(rule, read, state))
        folded, count = self._prepared, self.num_class_tokens
        if tokens.dtype != folded.weight.dtype:  # under autocast
            tokens = tokens[:, : max(1, count)].to(folded.weight.dtype)
        return exit_step(read, tokens, count, folded.weight, folded.bias, rule, state)

    @property
    def _prepared(self) -> FoldedHead:
        if self.folded is None:
            raise RuntimeError("the exit head is not prepared: call prepare(dtype) first")
        return self.folded

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype, *, anew: bool = False) -> None:
        """Fold the head for compute `dtype`, unless nothing changed since the last time.

        A change is seen by a tensor's identity, storage and version counter, and what escapes the
        counter (a write through `.data` or to an inference tensor) by a checksum of every byte: on a
        CPU at every call, on a GPU within as many calls as the head has tensors. A head without a
        pooled form has nothing to fold.

        Args:
            dtype: of the tokens to come.
            anew: fold whether or not a change was seen.
        """
        if not self.fused:
            return
        if not anew and self.folded is not None and self.folded.weight.dtype == dtype:
            if self._watch is not None and not self._watch.changed():
                return
        linears = self._linears
        with torch.autocast(linears[0].weight.device.type, enabled=False):
            shares = [linear.weight.double() / len(linears) for linear in linears]
            classifier = torch.stack(shares).sum(0)
            bias = torch.stack([linear.bias.double() for linear in linears]).mean(0)
            if self.readout.affine:
                perception, weight, offset = self.perception.fold(dtype, classifier)
                bias = bias + offset
            else:
                perception = self.perception.fold_feature(dtype)
                weight = classifier * self._norm.weight.double()
                bias = bias + classifier @ self._norm.bias.double()
            weight = torch.cat((weight, *shares[: self.num_class_tokens]), dim=1)
            vectors = torch.promote_types(dtype, torch.float32)
            self.folded = FoldedHead(perception, weight.to(dtype), bias.to(vectors))
        self._watch = Watch(self)

    @property
    def _linears(self) -> list[nn.Linear]:
        return cast(list[nn.Linear], list(self.classifiers))

    @property
    def _norm(self) -> nn.LayerNorm:
        return cast(nn.LayerNorm, self.readout.norm)

    def train(self, mode: bool = True) -> ExitHead:
        """Sets the mode; returning to train mode drops the folded weights."""
        if mode:
            self.folded = self._watch = None
        super().train(mode)
        return self


def _classifiers(count: int, width: int, num_classes: int) -> nn.ModuleList:
    """Fresh linear classifiers."""
    linears = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(count))
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
    return linears


def _perception(spec: ExitSpec, width: int, num_heads: int, pool: str) -> Any:
    """The head proper that a spec names."""
    if num_heads < 1 or (spec.attends and width % num_heads):
        raise ValueError(
            f"num_heads={num_heads} must be positive and divide the width {width} of block {spec.layer}"
        )
    match spec.family:
        case "lph_full" | "lph_light":
            return LocalPerceptionHead(width, full=spec.family == "lph_full")
        case "gah":
            return GlobalAggregationHead(width, spec.stride, num_heads, pool)
        case "vit_ee":
            return BlockHead(width, num_heads, spec.number or 4)
        case "attention":
            return AttentionHead(width, num_heads)
        case "conv":
            return ConvHead(width)
        case "mlp":
            return MLPHead(width)
    return LinearHead()
