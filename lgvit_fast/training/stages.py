"""What each stage minimises: a module from (images, targets) to the loss and its terms.

A stage is a module around the model, so that distributed wrappers see one ordinary forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lgvit_fast.model import LGViT
from lgvit_fast.outputs import ExitOutputs
from lgvit_fast.training.config import Stage1Config, Stage2Config
from lgvit_fast.training.losses import (
    Stage2Losses,
    cross_entropy,
    distillation,
    stage1_loss,
    stage2_losses,
)
from lgvit_fast.training.tokens import Tokens, all_exits

Terms = dict[str, Tensor]


class Stage1(nn.Module):
    """Stage 1: backbone and heads, end to end (`losses.stage1_loss`)."""

    name = "stage1"

    def __init__(self, model: LGViT, config: Stage1Config, label_smoothing: float = 0.0) -> None:
        super().__init__()
        model.freeze_backbone(False)
        self.model, self.config, self.label_smoothing = model, config, label_smoothing

    def forward(self, images: Tensor, targets: Tensor, update: int) -> tuple[Tensor, Terms]:
        """Loss of images `[B, C, H, W]` at an update (the alternation counter), and its parts."""
        outputs = self.model.forward_exits(images)
        exit_ce = [cross_entropy(logits, targets, self.label_smoothing) for logits in outputs.exits]
        final_ce = cross_entropy(outputs.final, targets, self.label_smoothing)
        exit_kd = None
        if self.config.strategy.endswith("distillation"):
            exit_kd = [distillation(logits, outputs.final.detach()) for logits in outputs.exits]
        if self.config.strategy == "self_distillation" and exit_kd is not None:
            exit_kd = [kd * self.model.num_classes for kd in exit_kd]
        loss = stage1_loss(
            exit_ce,
            final_ce,
            [spec.layer for spec in self.model.exits],
            self.model.num_blocks,
            self.config.strategy,
            update,
            exit_kd,
            self.config.alpha,
        )
        terms = {"ce_final": final_ce, "ce_exits": torch.stack(exit_ce).mean()}
        return loss, {name: term.detach() for name, term in terms.items()}


class Stage2(nn.Module):
    """Stage 2: the heads alone, taught by the backbone, frozen here (`losses.stage2_losses`).

    Args:
        model: whose heads are taught.
        config: the weights of the terms.
        label_smoothing: of the cross-entropy.
        labelled: whether there are targets; without them there is no cross-entropy.
    """

    name = "stage2"

    def __init__(
        self,
        model: LGViT,
        config: Stage2Config,
        label_smoothing: float = 0.0,
        labelled: bool = True,
    ) -> None:
        super().__init__()
        model.freeze_backbone()
        self.model, self.config, self.label_smoothing = model, config, label_smoothing
        self.labelled = labelled
        if config.published and len(model.adapter.depths) > 1:
            raise ValueError("published=True: the published code has no stage 2 of LGViT for Swin")

    def forward(
        self, images: Tensor | Tokens, targets: Tensor, update: int
    ) -> tuple[Tensor, Terms]:
        """Loss of images `[B, C, H, W]`, and its parts (each summed over exits or pairs)."""
        losses = self.losses(images, targets if self.labelled else None)
        if not self.labelled:
            loss = losses.unlabelled(self.model.num_classes, self.config.beta, self.config.gamma)
        elif self.config.strategy == "distillation":
            layers = [spec.layer for spec in self.model.exits]
            loss = losses.distillation(layers, self.config.alpha)
        else:
            loss = losses.total(self.config.alpha, self.config.beta, self.config.gamma)
        return loss, {
            name: torch.stack(terms).sum().detach() if terms else loss.new_zeros(())
            for name, terms in vars(losses).items()
        }

    def losses(self, images: Tensor | Tokens, targets: Tensor | None) -> Stage2Losses:
        """Every term of the loss, not yet weighted."""
        outputs, teacher = self.outputs(images)
        assert outputs.features is not None  # asked for
        return stage2_losses(
            outputs.exits,
            outputs.features,
            outputs.last_tokens,
            outputs.patch_grid,
            teacher,
            targets,
            self.model.exits,
            temperature=self.config.temperature,
            label_smoothing=self.label_smoothing,
            pool=self.model.pool,
            published=self.config.published,
        )

    def outputs(self, images: Tensor | Tokens) -> tuple[ExitOutputs, Tensor]:
        """All exits' outputs and the teacher's logits `[B, K]`."""
        if isinstance(images, Tokens) or not self.config.published:
            outputs = all_exits(self.model, images, features=True)
            return outputs, outputs.final
        # The published teacher is the classifier on the raw last tokens, without the final norm.
        backbone: Any = self.model.backbone
        raw: list[Tensor] = []
        with backbone.norm.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0])):
            outputs = self.model.forward_exits(images, features=True)
        return outputs, backbone.forward_head(raw[0].detach())
