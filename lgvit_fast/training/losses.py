"""The losses of both training stages, as pure functions of logits and features.

`stage1_loss` trains backbone and heads together; `stage2_losses` trains the heads against a frozen
backbone (LGViT, ACM MM 2023, arXiv 2308.00255, section 3.3). Targets are class indices `[B]` or,
under Mixup, probabilities `[B, K]`. Everything is computed in float32 whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lgvit_fast.heads.layout import ExitSpec
from lgvit_fast.ops.gah import pool_grid

Strategy = Literal[
    "normal",
    "weighted",
    "alternating",
    "alternating_weighted",
    "distillation",
    "self_distillation",
]
Distance = Callable[[Tensor, Tensor], Tensor]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


# ------------------------------------------------------------------------------------ stage 1


def stage1_loss(
    exit_ce: Sequence[Tensor],
    final_ce: Tensor,
    layers: Sequence[int],
    num_blocks: int,
    strategy: Strategy = "alternating_weighted",
    update: int = 0,
    exit_kd: Sequence[Tensor] | None = None,
    alpha: float = 0.3,
) -> Tensor:
    """Combine the classifiers' losses into the one that stage 1 descends.

    Args:
        exit_ce: cross-entropy of each exit, E scalars.
        final_ce: cross-entropy of the backbone's own classifier.
        layers: 1-based block of each exit; the weights of the weighted strategies.
        num_blocks: L, the final classifier's weight.
        strategy: `normal` is the mean over all classifiers; `weighted` weighs each by its layer;
            the `alternating` ones train the final classifier alone on even updates and everything
            (`normal` or `weighted`) on odd ones; `distillation` is
            `(1 - alpha) normal + alpha mean(exit_kd)`; `self_distillation` is
            `final_ce + mean((1 - alpha) exit_ce + alpha exit_kd)`: every update trains every
            classifier, and the final one counts as much as all exits together.
        update: number of optimizer updates done so far in this stage (the alternation counter).
        exit_kd: distillation loss of each exit, needed by `distillation` and, not divided by K, by
            `self_distillation`.
        alpha: weight of the distillation term.

    Returns:
        The scalar loss.

    Raises:
        ValueError: if the strategy is unknown or lacks its distillation losses.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if strategy.startswith("alternating") and update % 2 == 0:
        return final_ce
    if strategy.endswith("weighted"):
        weighted = sum((layer * ce for layer, ce in zip(layers, exit_ce, strict=True)), 0.0)
        return (weighted + num_blocks * final_ce) / (sum(layers) + num_blocks)
    mean = (sum(exit_ce, 0.0) + final_ce) / (len(exit_ce) + 1)
    if not strategy.endswith("distillation"):
        return mean
    if exit_kd is None:
        raise ValueError(f"the {strategy} strategy needs exit_kd")
    mean_kd = sum(exit_kd, 0.0) / len(exit_kd)
    if strategy == "self_distillation":
        return final_ce + (1 - alpha) * sum(exit_ce, 0.0) / len(exit_ce) + alpha * mean_kd
    return (1 - alpha) * mean + alpha * mean_kd


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits `[B, K]` for targets `[B]` (classes) or `[B, K]` (probabilities)."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """`T^2 KL(teacher || student) / (B K)` of logits `[B, K]` softened by the temperature T."""
    student_log = F.log_softmax(student.float() / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    return divergence * temperature**2 / max(student.numel(), 1)


# ------------------------------------------------------------------------------------ stage 2


@dataclass(frozen=True)
class Stage2Losses:
    """The terms of stage 2, each kept apart: E scalars in `ce` and `kd`, one per pair elsewhere.

    A role that the layout lacks (no LPH, a single GAH, ...) leaves its term empty, and no labels `ce`.
    """

    ce: tuple[Tensor, ...]
    kd: tuple[Tensor, ...]
    hete: tuple[Tensor, ...]
    homo_local: tuple[Tensor, ...]
    homo_global: tuple[Tensor, ...]

    def total(self, alpha: float = 0.3, beta: float = 0.01, gamma: float = 0.01) -> Tensor:
        """`(1 - alpha) sum CE + alpha sum KD + beta hete + gamma (homo_local + homo_global)`."""
        classes = (1 - alpha) * self._sum(self.ce) + alpha * self._sum(self.kd)
        return classes + self._features(beta, gamma)

    def unlabelled(self, num_classes: int, beta: float = 0.01, gamma: float = 0.01) -> Tensor:
        """`K sum KD + beta hete + gamma (homo_local + homo_global)`: no cross-entropy.

        K takes back the division of KD by the number of classes, which suits a term beside the
        cross-entropy: alone, with many classes, it would vanish beside the features.
        """
        return num_classes * self._sum(self.kd) + self._features(beta, gamma)

    def _features(self, beta: float, gamma: float) -> Tensor:
        return beta * self._sum(self.hete) + gamma * self._sum(self.homo_local + self.homo_global)

    def _sum(self, terms: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(terms).sum() if terms else self.kd[0].new_zeros(())

    def distillation(self, layers: Sequence[int], alpha: float = 0.3) -> Tensor:
        """`(1 - alpha) sum l_e CE_e / sum l_e + alpha mean KD`: for heads of any kind."""
        weighted = torch.stack([layer * ce for layer, ce in zip(layers, self.ce, strict=True)])
        return (1 - alpha) * weighted.sum() / sum(layers) + alpha * torch.stack(self.kd).mean()


def stage2_losses(
    exit_logits: Sequence[Tensor],
    features: Sequence[Tensor],
    last_tokens: Tensor | None,
    patch_grid: tuple[int, int],
    teacher_logits: Tensor,
    targets: Tensor | None,
    exits: Sequence[ExitSpec],
    *,
    temperature: float = 2.0,
    label_smoothing: float = 0.0,
    pool: str = "subsample",
    published: bool = False,
) -> Stage2Losses:
    """Every term of stage 2.

    The heterogeneous pairs are the first and last local head and the first and last global head,
    each with the last block's tokens. The homogeneous pairs are each local head with the last local
    one, and each global head with the last global one. Features of different width (on different
    levels of a hierarchical backbone) cannot be compared: the homogeneous teacher is then the last
    head of the same width, and a heterogeneous pair is left out.

    Args:
        exit_logits: E tensors `[B, K]`.
        features: E tensors `[B, n_e, C]`, the heads' outputs before pooling.
        last_tokens: `[B, N, C]`, the last block's patch tokens before the final norm; None leaves out
            the heterogeneous pairs.
        patch_grid: (H, W) of `last_tokens`, H W = N.
        teacher_logits: `[B, K]`, what the exits are to imitate.
        targets: `[B]` classes or `[B, K]` probabilities; None leaves out the cross-entropy.
        exits: the E exits' layer, kind (`local` or `global`) and stride.
        temperature: T of the logit distillation.
        label_smoothing: of the cross-entropy.
        pool: how the global heads reduce the grid, `subsample` or `average`.
        published: reproduce the published code: gradients reach the homogeneous teachers and Gram
            matrices are compared unnormalised. For parity with its numbers only.
    """
    teacher_logits = teacher_logits.detach()
    teacher_tokens = None if last_tokens is None else last_tokens.detach()
    local = [i for i, spec in enumerate(exits) if spec.kind == "local"]
    global_ = [i for i, spec in enumerate(exits) if spec.kind == "global"]

    hete = []
    for i in dict.fromkeys(local[:1] + local[-1:] + global_[:1] + global_[-1:]):
        if teacher_tokens is None:
            break
        teacher = pool_grid(teacher_tokens, patch_grid, exits[i].stride, pool)
        if teacher.shape == features[i].shape:
            hete.append(channel_divergence(features[i], teacher))

    def to_last(roles: list[int], distance: Distance) -> tuple[Tensor, ...]:
        last = {features[i].shape[-1]: i for i in roles}  # the deepest head of each width
        pairs = [(features[i], features[last[features[i].shape[-1]]]) for i in roles]
        return tuple(
            distance(student, teacher if published else teacher.detach())
            for student, teacher in pairs
            if student is not teacher
        )

    return Stage2Losses(
        ce=()
        if targets is None
        else tuple(cross_entropy(logits, targets, label_smoothing) for logits in exit_logits),
        kd=tuple(distillation(logits, teacher_logits, temperature) for logits in exit_logits),
        hete=tuple(hete),
        homo_local=to_last(local, _mean_square),
        homo_global=to_last(global_, published_gram_distance if published else gram_distance),
    )


def channel_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) between the tokens' softmaxes over channels, `[B, n, C]`, over B.

    Summed over tokens, as published, so it grows with their number.
    """
    student_log = F.log_softmax(student.float(), dim=-1)
    teacher_log = F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the Gram matrices `y^T y` `[B, C, C]`, each scaled to unit Frobenius norm.

    Lies in [0, 2] whatever the width, the number of tokens (heads of different stride differ) and
    the features' scale. Mean over B.
    """
    difference = F.normalize(_gram(student).flatten(1)) - F.normalize(_gram(teacher).flatten(1))
    return difference.square().sum(dim=1).mean()


def published_gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square difference of plain Gram matrices, as published: near 1e4, it swamps the rest."""
    return F.mse_loss(_gram(student), _gram(teacher))


def _gram(features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        return features.transpose(1, 2) @ features


def _mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square difference of two features `[B, n, C]`."""
    return F.mse_loss(student.float(), teacher.float())
