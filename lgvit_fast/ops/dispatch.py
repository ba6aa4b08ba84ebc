"""The one rule by which every op picks its backend: Triton, C++ or plain torch.

An op lists its backends from the most to the least preferred; the last is the torch reference,
which always runs. The automatic choice takes the first that does not refuse, or the fastest of those
where an op has a contest, and logs each refusal once. An explicit choice (an argument, `backend(...)`,
or ``LGVIT_BACKEND``) is an order: if it cannot be followed, the call raises and says why.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from lgvit_fast.ops.contest import Contest

CHOICES = ("auto", "triton", "cpp", "torch")

_logger = logging.getLogger("lgvit_fast")


def _never_missing(device: torch.device) -> str | None:
    return None


def _never_refuse(*args: Any, **kwargs: Any) -> str | None:
    return None


Result = TypeVar("Result")


@dataclass(frozen=True)
class Backend(Generic[Result]):
    """One implementation of an op.

    Attributes:
        name: "triton", "cpp" or "torch".
        run: The implementation; takes the op's own arguments.
        missing: Takes the device of the op's first argument and says, in plain words, why this
            backend cannot run there at all (not built, not installed, wrong device), or None.
        refuse: Takes the op's own arguments and says why it cannot run on these (a dtype, a shape,
            a stride), without the sizes at hand, so that a reason is logged once and not per
            shape; or None. Asked only if nothing is missing.
    """

    name: str
    run: Callable[..., Result]
    missing: Callable[[torch.device], str | None] = _never_missing
    refuse: Callable[..., str | None] = _never_refuse


class OpReport(NamedTuple):
    """Which backend an op takes on a device, and why not the ones it prefers."""

    op: str
    backend: str
    refused: dict[str, str]


class Op(Generic[Result]):
    """An op with several backends, called like a function.

    Args:
        name: The op's name in messages and reports.
        backends: In order of preference, the torch reference last. Each takes the same arguments,
            the first of which is a tensor on the device where the work is done.
        contest: Picks among those before the reference that do not refuse; None takes the first.
        compiled: Takes a call that is being compiled in place of the contest, which cannot be held
            there: one node of the compiled graph, which asks `measured` when it runs. None takes the
            first that does not refuse.
    """

    def __init__(
        self,
        name: str,
        *backends: Backend[Result],
        contest: Contest | None = None,
        compiled: Backend[Result] | None = None,
    ) -> None:
        if not backends or backends[-1].name != "torch":
            raise ValueError(f"the last backend of op {name!r} must be the torch reference")
        self.name = name
        self.backends = backends
        self._contest, self._compiled = contest, compiled
        _registry[name] = self

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Result:
        """Runs the op.

        Args:
            *args: The op's own arguments.
            backend: "auto", "triton", "cpp" or "torch"; None takes the choice in force (`backend`,
                else ``LGVIT_BACKEND``, else "auto").
            **kwargs: The op's own keyword arguments.

        Raises:
            ValueError: `backend` is no known name.
            RuntimeError: `backend` is an explicit choice that cannot run; the message says why.
        """
        chosen = self.choose(*args, backend=backend, **kwargs)
        return chosen.run(*args, **kwargs)

    def choose(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Backend[Result]:
        """The backend that a call with these arguments runs on; raises as the call would."""
        name = _choice.get() if backend is None else _checked(backend)
        if name != "auto":
            for candidate in self.backends:
                if candidate.name == name:
                    reason = candidate.missing(args[0].device) or candidate.refuse(*args, **kwargs)
                    if reason:
                        raise RuntimeError(f"{self.name}: backend {name!r} cannot run: {reason}")
                    return candidate
            if backend is not None:
                has = ", ".join(candidate.name for candidate in self.backends)
                raise RuntimeError(f"{self.name}: there is no {name!r} backend, only {has}")
            # A choice made for all ops does not address one that has no such backend.
        willing: list[Backend[Result]] = []
        compiling = torch.compiler.is_compiling()
        for candidate in self.backends[:-1]:
            reason = candidate.missing(args[0].device) or candidate.refuse(*args, **kwargs)
            if reason is None:
                if self._contest is None or (compiling and self._compiled is None):
                    return candidate
                willing.append(candidate)
            elif not compiling:
                _log_once(self.name, candidate.name, reason)
        if self._contest is None or len(willing) < 2:
            return (*willing, self.backends[-1])[0]
        if compiling and self._compiled is not None:
            return self._compiled
        return willing[self._contest.winner(_runs(willing), *args, **kwargs)]

    def measured(self, *args: Any) -> Backend[Result]:
        """The automatic choice for these arguments as far as it is known; nothing is measured."""
        able = [c for c in self.backends[:-1] if not c.missing(args[0].device)]
        willing = [c for c in able if not c.refuse(*args)]
        if self._contest is None or len(willing) < 2:
            return (*willing, self.backends[-1])[0]
        return willing[self._contest.known(_runs(willing), *args) or 0]

    def report(self, device: torch.device) -> OpReport:
        """The automatic choice on `device`, as far as it does not depend on the arguments."""
        refused: dict[str, str] = {}
        for candidate in self.backends[:-1]:
            reason = candidate.missing(device)
            if reason is None:
                return OpReport(self.name, candidate.name, refused)
            refused[candidate.name] = reason
        return OpReport(self.name, self.backends[-1].name, refused)


def _runs(backends: list[Backend[Any]]) -> list[tuple[str, Callable[..., Any]]]:
    return [(backend.name, backend.run) for backend in backends]


def report(device: torch.device | str) -> list[OpReport]:
    """One row for each op: the backend it takes on `device`, and why it refused better ones."""
    return [op.report(torch.device(device)) for op in _registry.values()]


def chosen_backend() -> str:
    """The choice in force in this thread: "auto", "triton", "cpp" or "torch"."""
    return _choice.get()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Sets the backend of every op inside a ``with`` block, in this thread only.

    An op that has no backend of that name keeps its automatic choice.

    Args:
        name: "auto", "triton", "cpp" or "torch".

    Raises:
        ValueError: `name` is none of these.
    """
    token = _choice.set(_checked(name))
    try:
        yield
    finally:
        _choice.reset(token)


def _checked(name: str, source: str = "backend") -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}; got {name!r}")
    return name


def _log_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _logged:
        _logged.add((op, name, reason))
        _logger.info("%s: not on %s: %s", op, name, reason)


_registry: dict[str, Op[Any]] = {}
_logged: set[tuple[str, str, str]] = set()
_environment: str = _checked(os.environ.get("LGVIT_BACKEND", "auto"), "LGVIT_BACKEND")
_choice: ContextVar[str] = ContextVar("lgvit_backend", default=_environment)
