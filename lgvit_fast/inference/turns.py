"""Whose turn it is: the lock of an engine or a stream, asked again from inside, or after a fork.

`with take_turn(self, "the engine"):` in a method of the owner enters a lock written in C, so that no
signal comes between taking it and the block that gives it back.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from threading import RLock
from typing import Any
from weakref import WeakSet

__all__ = ["add_lock", "take_turn"]

_owners: WeakSet[Any] = WeakSet()


def add_lock(owner: Any) -> None:
    """Give `owner` a lock; a forked child gets a fresh one, as no thread there would free the old."""
    owner._lock = RLock()
    _owners.add(owner)


def take_turn(owner: Any, name: str) -> AbstractContextManager[Any]:
    """The owner's lock, to be entered at once.

    Raises:
        RuntimeError: this thread holds it: the owner was asked from inside its own policy, loader or
            callback, or from a signal handler.
    """
    while owner._lock._is_owned():
        if not _is_asked_from_inside(owner):  # a debugger or tracer raised where no signal can
            owner._lock.release()
            continue
        raise RuntimeError(
            f"{name} is answering a batch; it cannot be asked from inside that call (its policy or"
            " loader, a callback or a signal handler)"
        )
    lock: AbstractContextManager[Any] = owner._lock
    return lock


def _is_asked_from_inside(owner: Any) -> bool:
    """Whether a method of `owner` is running in this thread besides the one that asks."""
    frame = sys._getframe(2).f_back
    while frame is not None:
        if frame.f_locals.get("self") is owner:
            return True
        frame = frame.f_back
    return False


def _renew() -> None:
    for owner in list(_owners):
        owner._lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
