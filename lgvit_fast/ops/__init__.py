"""Ops: each has a torch reference and faster backends, chosen by one rule."""

from lgvit_fast.ops.compact import compact_
from lgvit_fast.ops.dispatch import backend, report

__all__ = ["backend", "compact_", "report"]
