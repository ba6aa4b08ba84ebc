"""Checkpoints and models from elsewhere, and the way back."""

from lgvit_fast.checkpoints.huggingface import from_huggingface
from lgvit_fast.checkpoints.published import export_published, load_published
from lgvit_fast.checkpoints.timm_files import from_timm, is_timm
from lgvit_fast.checkpoints.torchvision import from_torchvision

__all__ = [
    "export_published",
    "from_huggingface",
    "from_timm",
    "from_torchvision",
    "is_timm",
    "load_published",
]
