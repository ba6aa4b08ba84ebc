"""Reading a loader: when asked, or ahead in a thread."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from threading import Event, Thread
from typing import Any

__all__ = ["EXHAUSTED", "PulledSource", "ThreadedSource"]

EXHAUSTED = object()


class PulledSource:
    """Reads the loader in the caller's thread, exactly when the caller asks."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None

    def get(self, timeout: float | None = None) -> Any:
        """The next item, or `EXHAUSTED`. Takes as long as the loader takes."""
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator, EXHAUSTED)

    def close(self) -> None:
        """Let go of the loader."""
        self._loader, self._iterator = (), None


class ThreadedSource:
    """Reads the loader in a thread, one item ahead, so that waiting for it can end in time."""

    _GLANCE = 0.05  # seconds between looks at whether to stop

    def __init__(self, loader: Iterable[Any]) -> None:
        self._items: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._stop = Event()
        self._ended = False
        self._thread = Thread(target=self._read, args=(loader,), daemon=True)
        self._thread.start()

    def get(self, timeout: float | None = None) -> Any:
        """The next item, `EXHAUSTED`, or None if none came within `timeout` seconds.

        Raises:
            Exception: whatever the loader raised.
        """
        if self._ended:
            return EXHAUSTED
        try:
            item = self._items.get(timeout=timeout)
        except queue.Empty:
            return None
        self._ended = item is EXHAUSTED or isinstance(item, _Failure)
        if isinstance(item, _Failure):
            raise item.error
        return item

    def close(self) -> None:
        """Stop reading. A loader in the middle of an item finishes it in the background."""
        self._stop.set()
        self._ended = True

    def _read(self, loader: Iterable[Any]) -> None:
        try:
            for item in loader:
                if not self._put(item):
                    return
            self._put(EXHAUSTED)
        except BaseException as error:
            self._put(_Failure(error))

    def _put(self, item: Any) -> bool:
        """Hand over an item; False when told to stop."""
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=self._GLANCE)
                return True
            except queue.Full:
                continue
        return False


class _Failure:
    """An exception on its way from the reading thread."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
