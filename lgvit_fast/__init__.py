"""lgvit_fast: vision transformers that answer easy images early, fast on real batches.

    import lgvit_fast

    model = lgvit_fast.create_model("vit_base_patch16_224", num_classes=100)
    model.policy = lgvit_fast.Confidence(0.8)
    logits = model.eval()(images)

The method is LGViT: "Dynamic Early Exiting for Accelerating Vision Transformer" (ACM MM 2023,
arXiv 2308.00255).
"""

from lgvit_fast import ops
from lgvit_fast._version import __version__
from lgvit_fast.heads import ExitSpec
from lgvit_fast.interop import load_published
from lgvit_fast.model import LGViT, create_model
from lgvit_fast.outputs import ExitOutputs, Inference
from lgvit_fast.policies import Confidence, Entropy, Patience, PatientConfident, Policy, Replay

__all__ = [
    "Confidence",
    "Entropy",
    "ExitOutputs",
    "ExitSpec",
    "Inference",
    "LGViT",
    "Patience",
    "PatientConfident",
    "Policy",
    "Replay",
    "__version__",
    "create_model",
    "load_published",
    "ops",
]
