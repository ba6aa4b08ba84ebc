"""lgvit_fast: vision transformers that answer easy images early, fast on real batches.

    import lgvit_fast

    model = lgvit_fast.create_model("vit_base_patch16_224", num_classes=100)
    model.policy = lgvit_fast.Confidence(0.8)
    logits = model.eval()(images)

The method is LGViT: "Dynamic Early Exiting for Accelerating Vision Transformer" (ACM MM 2023,
arXiv 2308.00255).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lgvit_fast._timm_hook import register_with_timm
from lgvit_fast._version import __version__

if TYPE_CHECKING:
    from lgvit_fast import ops
    from lgvit_fast.certificate import Certificate
    from lgvit_fast.checkpoints import load_published
    from lgvit_fast.deploy.exporter import export
    from lgvit_fast.evaluation import Calibration, calibrate
    from lgvit_fast.heads import ExitSpec
    from lgvit_fast.inference import Engine, pack_, plan_exits, stream
    from lgvit_fast.model import LGViT, create_model
    from lgvit_fast.outputs import ExitOutputs, Inference
    from lgvit_fast.policies import (
        Confidence,
        Entropy,
        Learned,
        Patience,
        PatientConfident,
        Policy,
        Replay,
    )
    from lgvit_fast.training.distill import distill

__all__ = [
    "Calibration",
    "Certificate",
    "Confidence",
    "Engine",
    "Entropy",
    "ExitOutputs",
    "ExitSpec",
    "Inference",
    "LGViT",
    "Learned",
    "Patience",
    "PatientConfident",
    "Policy",
    "Replay",
    "__version__",
    "calibrate",
    "create_model",
    "distill",
    "export",
    "load_published",
    "ops",
    "pack_",
    "plan_exits",
    "stream",
]

# Names are imported when first used: torch takes seconds, and `lgvit-fast --help` needs none of it.
_HOME = {
    "heads": ("ExitSpec",),
    "inference": ("Engine", "pack_", "plan_exits", "stream"),
    "certificate": ("Certificate",),
    "checkpoints": ("load_published",),
    "deploy.exporter": ("export",),
    "evaluation": ("Calibration", "calibrate"),
    "model": ("LGViT", "create_model"),
    "outputs": ("ExitOutputs", "Inference"),
    "policies": (
        "Confidence",
        "Entropy",
        "Learned",
        "Patience",
        "PatientConfident",
        "Policy",
        "Replay",
    ),
    "training.distill": ("distill",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("lgvit_fast.ops")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"lgvit_fast.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_timm()
