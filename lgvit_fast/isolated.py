"""Something that answers requests in a process of its own, and runs only while it is asked.

Idle threads of one runtime may spin and slow another one, in the same process or not. So what is
measured beside something else gets a process, which the kernel stops (SIGSTOP) between requests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Failure", "Isolated"]


class Failure(Exception):
    """Why a process cannot answer: what it raised, how it ended, or how long it was waited for."""


class Isolated:
    """A process that makes something to ask, and answers with it.

    Args:
        make: a function of a module. Called once, in the process, with `arguments`; what it returns
            is called with each request.
        arguments: pickled, as are requests and answers.
        timeout: seconds to wait for an answer.

    Raises:
        Failure: `make` raised, or did not return in time.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], *arguments: Any, timeout: float):
        context = multiprocessing.get_context("spawn")
        self._timeout = timeout
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, request: Any) -> Any:
        """The answer to a request.

        Raises:
            Failure: there is none, and never will be.
        """
        self._signal(signal.SIGCONT)
        try:
            self._connection.send(request)
        except OSError as error:
            raise self._ended() from error
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            if not self._connection.poll(self._timeout):
                raise Failure(f"no answer within {self._timeout:g} s")
            reason, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        self._signal(signal.SIGSTOP)
        if reason is not None:
            raise Failure(reason)
        return answer

    def _ended(self) -> Failure:
        self._process.join(5)
        return Failure(f"its process ended with code {self._process.exitcode}")

    def _signal(self, number: signal.Signals) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)


def _serve(
    connection: Connection, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]
) -> None:
    """The process: pairs of what went wrong, or None, and an answer, until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is interrupted, and ends this
    try:
        answer = make(*arguments)
        connection.send((None, None))
        while (request := _next(connection)) is not None:
            connection.send((None, answer(*request)))
    except BrokenPipeError:
        return
    except Exception as error:  # exporters, compilers and runtimes raise anything
        text = " ".join(str(error).split())
        connection.send((f"{type(error).__name__}: {text[:300]}", None))


def _next(connection: Connection) -> tuple[Any] | None:
    """The next request, or None where there will be none."""
    try:
        return (connection.recv(),)
    except EOFError:
        return None
