"""How many threads a model may use inside Ray."""

from __future__ import annotations

__all__ = ["reserved_threads"]


def reserved_threads() -> int | None:
    """The processors that Ray reserved for this actor, at least 1; None outside a running Ray.

    Ray limits no process to what it reserved: several actors of a machine that each took every
    processor would slow one another down.
    """
    import ray

    if not ray.is_initialized():
        return None
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
