"""Checkpoints and models from elsewhere."""

from lgvit_fast.interop.published import load_published

__all__ = ["load_published"]
