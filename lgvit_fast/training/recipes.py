"""The compared methods as recipes."""

from __future__ import annotations

from dataclasses import dataclass

from lgvit_fast.policies import Confidence, Patience, PatientConfident, Policy
from lgvit_fast.training.losses import Strategy

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A method: what its exits are, how it is trained, when an image leaves (paper section 4.2).

    Attributes:
        paper: where it comes from.
        heads: of all exits, see `lgvit_fast.LGViT`.
        strategy: of stage 1.
        stages: "1", or "both" for a method with a second stage.
        policy: with the published defaults.
    """

    paper: str
    heads: str
    strategy: Strategy
    stages: str
    policy: Policy

    def policy_for(self, num_exits: int) -> Policy:
        """The policy, its patience no more than the exits of a model."""
        match self.policy:
            case Patience(patience):
                return Patience(min(patience, num_exits))
            case PatientConfident(threshold, patience):
                return PatientConfident(threshold, min(patience, num_exits))
        return self.policy


RECIPES = {
    "sdn": Recipe(
        "Shallow-Deep Networks, Kaya et al., ICML 2019",
        heads="linear",
        strategy="normal",
        stages="1",
        policy=Confidence(),
    ),
    "pabee": Recipe(
        "BERT Loses Patience, Zhou et al., NeurIPS 2020",
        heads="linear",
        strategy="weighted",
        stages="1",
        policy=Patience(),
    ),
    "berxit": Recipe(
        "BERxiT, Xin et al., EACL 2021",
        heads="linear",
        strategy="alternating",
        stages="1",
        policy=Confidence(),
    ),
    "vit_ee": Recipe(
        "Multi-Exit Vision Transformer, Bakhtiarnia et al., BMVC 2021",
        heads="vit_ee",
        strategy="normal",
        stages="1",
        policy=Confidence(),
    ),
    "pcee": Recipe(
        "PCEE-BERT, Zhang et al., NAACL Findings 2022",
        heads="linear",
        strategy="weighted",
        stages="1",
        policy=PatientConfident(),
    ),
    "lgvit": Recipe(
        "LGViT, Xu et al., ACM MM 2023",
        heads="lgvit",
        strategy="alternating_weighted",
        stages="both",
        policy=Confidence(),
    ),
    "lgvit_joint": Recipe(
        "of this project: LGViT's heads, trained jointly in one stage",
        heads="lgvit",
        strategy="weighted",
        stages="1",
        policy=Confidence(),
    ),
}
