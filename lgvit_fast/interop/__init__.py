"""Checkpoints and models from elsewhere, and the way back."""

from lgvit_fast.interop.published import export_published, load_published

__all__ = ["export_published", "load_published"]
