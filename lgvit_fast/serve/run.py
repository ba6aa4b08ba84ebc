"""From a folder to a listening server, of one process or several."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lgvit_fast.deploy import Deployed
from lgvit_fast.deploy.manifest import Manifest, is_exported
from lgvit_fast.serve.app import create_app
from lgvit_fast.serve.hosts import hosts_of
from lgvit_fast.serve.metrics import SHARED_FOLDER
from lgvit_fast.serve.settings import Settings

__all__ = ["bind", "from_environment", "serve"]

_TOLD = "LGVIT_SERVE"  # what the processes of a server are told, as json
_CONNECTIONS = 1024  # of a process; more are refused with 503, and twice as many at once
_FILES = 8 * _CONNECTIONS  # open ones: each connection may have an upload on disk
_HEADERS_WITHIN = 10.0  # seconds
_READ_WITHIN = 30.0  # seconds, what has been answered
_LAST_WORDS = 1.0  # seconds for the 503 of those that were cut off, then connections are closed


def serve(
    folder: str | os.PathLike[str],
    settings: Settings,
    *,
    host: str,
    port: int,
    workers: int,
    runtime: str,
    threads: int | None,
) -> None:
    """Serve a model until SIGINT or SIGTERM; what was accepted is answered first, for a time.

    There is no authentication and no encryption: listen on other addresses only behind something that
    has both. On a loopback address, requests that name another host are refused.

    Args:
        folder: an exported model; a saved one is exported to a temporary folder first.
        settings: limits and batching.
        host: address to listen on.
        port: 0 takes a free one.
        workers: processes, each with the whole model. One that dies is started anew.
        runtime: as for `Deployed`.
        threads: of each process; None shares the processors out.

    Raises:
        FileNotFoundError, ValueError: no model there, or a damaged one; see `Deployed`.
        OSError: the address cannot be listened on.
        RuntimeError: the runtime is not installed.
    """
    if isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers={workers!r}, expected at least 1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with _exported(folder) as ready, bind(host, port) as listening:
        told = {
            "folder": str(ready),
            "settings": settings.to_json(),
            "runtime": runtime,
            "threads": threads,
            "hosts": hosts_of(host),
        }
        app = _app(told)  # also with several processes: one that cannot start is started for ever
        name = f"[{host}]" if ":" in host else "localhost" if host == "127.0.0.1" else host
        where = f"http://{name}:{listening.getsockname()[1]}"
        print(f"serving {os.fspath(folder)} on {where}", file=sys.stderr, flush=True)
        options: dict[str, Any] = {
            "http": _Protocol,
            "ws": "none",
            "log_level": "warning",
            "access_log": False,
            "server_header": False,
            "proxy_headers": False,
            "limit_concurrency": _CONNECTIONS,
        }
        if workers == 1:
            _one(uvicorn.Config(app, **options), listening)
        else:
            del app
            _several(told, workers, listening, options)


def _one(config: uvicorn.Config, listening: socket.socket) -> None:
    # uvicorn raises the signal that ended it once more, for whoever handled it before.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


def _several(
    told: dict[str, Any], workers: int, listening: socket.socket, options: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory(prefix="lgvit-metrics-") as shared:
        os.environ[_TOLD], os.environ[SHARED_FOLDER] = json.dumps(told), shared
        try:
            uvicorn.run(
                "lgvit_fast.serve.run:from_environment",
                factory=True,
                workers=workers,
                fd=listening.fileno(),
                **options,
            )
        finally:
            del os.environ[_TOLD], os.environ[SHARED_FOLDER]


def from_environment() -> FastAPI:
    """The application in one of the processes that `serve` started.

    If its worker dies it ends when those who waited have been told, and is started anew. If the process
    that started it is killed it ends, too, for it would keep the port.
    """
    if (parent := parent_process()) is not None:

        def watch() -> None:
            parent.join()
            _stop()

        threading.Thread(target=watch, daemon=True).start()
    return _app(json.loads(os.environ[_TOLD]), _stop)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _app(told: dict[str, Any], died: Callable[[], object] = lambda: None) -> FastAPI:
    deployed = Deployed(told["folder"], told["runtime"], told["threads"])
    settings = Settings.from_json(told["settings"])
    return create_app(deployed, settings, allowed_hosts=told["hosts"], died=died)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: it cannot; the message names the address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listening


@contextmanager
def _exported(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder with an exported model, made of a saved one if need be."""
    if is_exported(folder) or not Path(folder, "config.json").is_file():
        Manifest.load(folder)  # says what is wrong before anything is started
        yield Path(folder)
        return
    from lgvit_fast.deploy.exporter import export
    from lgvit_fast.model import LGViT

    with tempfile.TemporaryDirectory(prefix="lgvit-serve-") as temporary:
        print(f"exporting {os.fspath(folder)}", file=sys.stderr, flush=True)
        yield export(LGViT.from_pretrained(folder).eval(), Path(temporary, "exported"))


class _Protocol(H11Protocol):
    """uvicorn's, which lets a client take any time for the head of a request, and for its answer.

    Of the two that it has, the one that limits the size of a head (to 16 KiB).
    """

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > 2 * _CONNECTIONS:
            self.transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._cancel_unread()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        """Called when the client has not read for so long that the answer does not fit."""
        super().pause_writing()
        self._unread = self.loop.call_later(_READ_WITHIN, self.transport.abort)

    def resume_writing(self) -> None:
        """Called when it has read on."""
        self._cancel_unread()
        super().resume_writing()

    def shutdown(self) -> None:
        """Called of every connection when the server is told to stop."""
        super().shutdown()
        service = self.config.loaded_app.state.service
        service.stop_soon()
        self.loop.call_later(service.settings.stop_seconds + _LAST_WORDS, self.transport.abort)

    def _cancel_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch(self) -> None:
        """Close the connection unless the head of a request is whole in time."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEADERS_WITHIN, self.transport.close)
