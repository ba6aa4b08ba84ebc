"""An exported model where the evaluation expects one in torch."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.deploy import Deployed
from lgvit_fast.outputs import ExitOutputs, Inference
from lgvit_fast.policies import Policy

__all__ = ["ExportedModel"]


class ExportedModel:
    """`Deployed` with the part of `LGViT`'s interface that evaluating takes, in torch tensors.

    Attributes:
        certificate: the exported policy's, or one set since; None as soon as the policy is another.
        backbone: images to final logits with no image leaving, what early exit is timed against. All
            exits are asked on the way: an export has no graph without them.
    """

    training = False

    def __init__(self, deployed: Deployed) -> None:
        self.deployed = deployed
        self.exits = deployed.exits
        self.num_blocks, self.num_classes = deployed.num_blocks, deployed.num_classes
        self.class_names: Sequence[str] | None = deployed.class_names
        self.certificate = deployed.certificate
        self.backbone = _ToTheEnd(deployed)

    @property
    def policy(self) -> Policy:
        """The exported policy; setting it changes this object alone."""
        return self.deployed.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if policy != self.deployed.policy:
            self.certificate = None
        self.deployed.policy = policy

    @property
    def weights(self) -> str:
        """SHA-256 of the graphs' own, for a certificate."""
        hashes = "".join(segment.sha256 for segment in self.deployed.manifest.segments)
        return hashlib.sha256(hashes.encode()).hexdigest()

    def parameters(self) -> Iterator[Tensor]:
        """One empty tensor, which says where the model runs."""
        yield torch.empty(0)

    def forward_exits(self, images: Tensor) -> ExitOutputs:
        """Logits of every exit, without features."""
        *exits, final = torch.from_numpy(self.deployed.forward_exits(images.numpy())).unbind(0)
        return ExitOutputs(tuple(exits), final, None, None, (0, 0))

    def infer(self, images: Tensor, policy: Policy | None = None) -> Inference:
        """Each image's answer from the first exit that is sure."""
        answers = self.deployed(images.numpy(), policy)
        return Inference(
            logits=torch.from_numpy(answers.logits),
            exit_index=torch.from_numpy(answers.exit_index),
            exit_layer=torch.from_numpy(answers.exit_layer),
            nonfinite=torch.from_numpy(answers.nonfinite),
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write policy and certificate into the manifest."""
        certificate = None if self.certificate is None else self.certificate.to_dict()
        dataclasses.replace(
            self.deployed.manifest, policy=self.policy, certificate=certificate
        ).save(folder)


class _ToTheEnd:
    """The part of a backbone's interface that evaluating takes."""

    def __init__(self, deployed: Deployed) -> None:
        self.deployed = deployed
        self.input_spec = InputSpec(**dataclasses.asdict(deployed.manifest.preprocessing))

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.deployed(images.numpy(), Policy()).logits)
