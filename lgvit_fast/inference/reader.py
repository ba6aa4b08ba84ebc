"""Reading a loader: when asked, or ahead in a thread.

An interrupt can come between any two bytecodes. So a source writes what the loader gives straight
into a deque, the inbox, that belongs to the caller: one call, in C from the question to the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import chain, islice
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

__all__ = ["DIED", "EXHAUSTED", "NOTHING", "Inbox", "PulledSource", "ThreadedSource", "found"]

Inbox = deque[Any]  # (), (_ASKED,), (_ASKED, EXHAUSTED) or (_ASKED, item, EXHAUSTED)


class _Mark(Enum):
    NOTHING = "nothing came yet"
    ASKED = "the loader was asked"
    DIED = "the loader raised instead of answering"
    EXHAUSTED = "no more items"


NOTHING, DIED, EXHAUSTED = _Mark.NOTHING, _Mark.DIED, _Mark.EXHAUSTED
_ASKED = _Mark.ASKED


def found(inbox: Inbox) -> Any:
    """What an inbox holds: the loader's item, or `EXHAUSTED`, `DIED` or `NOTHING`."""
    if not inbox:
        return NOTHING
    return inbox[1] if len(inbox) > 1 else DIED


class PulledSource:
    """Reads the loader in the caller's thread, exactly when the caller asks."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None

    def get(self, inbox: Inbox, timeout: float | None = None) -> None:
        """Put the next item into an empty inbox. Takes as long as the loader takes.

        Raises:
            BaseException: whatever the loader raised. If `found(inbox)` is `DIED` it was asked for an
                item and cannot be asked again; otherwise the exception came before or after that.
        """
        if self._iterator is None:
            self._iterator = iter(self._loader)
        inbox.extend(chain((_ASKED,), islice(self._iterator, 1), (EXHAUSTED,)))

    def close(self) -> None:
        """Let go of the loader."""
        self._loader, self._iterator = (), None


class ThreadedSource:
    """Reads the loader in a thread, an item or two ahead, so that waiting for it can end in time."""

    _AHEAD = 2  # items waiting, past which no more are asked for

    def __init__(self, loader: Iterable[Any]) -> None:
        self._requests: SimpleQueue[bool] = SimpleQueue()
        self._items: SimpleQueue[Inbox] = SimpleQueue()
        self._errors: list[BaseException] = []
        queues = self._requests, self._items, self._errors
        self._thread = Thread(target=_read, args=(loader, *queues), daemon=True)
        self._thread.start()
        self._requests.put(True)

    def get(self, inbox: Inbox, timeout: float | None = None) -> None:
        """Put the next item into an empty inbox, if one comes within `timeout` seconds.

        Raises:
            BaseException: as `PulledSource.get`.
            RuntimeError: the reading thread is gone, as in a forked child.
        """
        if self._requests.empty() and self._items.qsize() < self._AHEAD:
            self._requests.put(True)  # one too many after an interrupt does no harm
        if not self._thread.is_alive() and self._items.empty():
            raise RuntimeError("the loader's reading thread is gone; a fork leaves it behind")
        try:
            inbox.extend(chain.from_iterable(map(self._items.get, (True,), (timeout,))))
        except Empty:
            return
        if found(inbox) is DIED:
            raise self._errors[0]

    def close(self) -> None:
        """Stop reading. A loader in the middle of an item finishes it in the background."""
        self._requests.put(False)


def _read(
    loader: Iterable[Any],
    requests: SimpleQueue[bool],
    items: SimpleQueue[Inbox],
    errors: list[BaseException],
) -> None:
    """Answer each request with a filled inbox, until there are no more items or no more requests."""
    source = PulledSource(loader)
    while requests.get():
        inbox: Inbox = deque()
        try:
            source.get(inbox)
        except BaseException as error:
            errors.append(error)
            inbox = deque([_ASKED])
        items.put(inbox)
        item = found(inbox)
        if item is DIED or item is EXHAUSTED:
            return
