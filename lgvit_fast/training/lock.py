"""One process at a time in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["locked"]

logger = logging.getLogger(__name__)

_FILE = ".lock"
_held: set[int] = set()  # open files that hold a lock here


def _let_go_in_child() -> None:
    """A loader's worker outlives a killed run for some seconds; the lock must not."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder, made if there is none, against other runs, on any machine that sees it.

    The system gives the lock back when the process ends, however it does.

    Raises:
        FileExistsError: another run holds it, saying which.
    """
    path = Path(folder) / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path)
    _held.add(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(handle)
        os.close(handle)


def _take(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise FileExistsError(
                f"{path.parent} is in use by {holder or 'another run'}; wait for it, stop it, or"
                " choose another output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(handle)
                raise
            logger.warning("%s is on a file system without locks", path.parent)
        with suppress(FileNotFoundError):
            # the run before may have removed the file between opening and locking it
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode())
    return handle
