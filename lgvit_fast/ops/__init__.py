"""The ops: each has a torch reference, faster backends where they exist, and one way of choosing."""

from lgvit_fast.ops.dispatch import backend, report

__all__ = ["backend", "report"]
