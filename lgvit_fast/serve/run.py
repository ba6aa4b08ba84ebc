"""From a folder to a listening server, of one process or several."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from lgvit_fast.deploy import Deployed
from lgvit_fast.deploy.manifest import Manifest, is_exported
from lgvit_fast.serve.app import create_app
from lgvit_fast.serve.metrics import SHARED_FOLDER
from lgvit_fast.serve.settings import Settings

__all__ = ["bind", "from_environment", "serve"]

_TOLD = "LGVIT_SERVE"  # what the processes of a server are told, as json
_CONNECTIONS = 1024  # of a process; more are refused with 503
_HEADERS_WITHIN = 10.0  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


def serve(
    folder: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    runtime: str = "auto",
    threads: int | None = None,
) -> None:
    """Serve a model until SIGINT or SIGTERM; what was accepted is answered first.

    There is no authentication and no encryption: listen on other addresses only behind something that
    has both. On a loopback address, requests that name another host are refused.

    Args:
        folder: an exported model; a saved one is exported to a temporary folder first.
        settings: limits and batching; None takes the defaults.
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
    settings = settings or Settings()
    if isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers={workers!r}, expected at least 1")
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with _exported(folder) as ready, bind(host, port) as listening:
        told = {
            "folder": str(ready),
            "settings": settings.to_json(),
            "runtime": runtime,
            "threads": threads,
            "hosts": list(_LOOPBACK) if host in _LOOPBACK else None,
        }
        app = _app(told)  # also with several processes: one that cannot start is started for ever
        name = f"[{host}]" if ":" in host else "localhost" if host in _LOOPBACK else host
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
    """The application in a process that `serve` started."""
    return _app(json.loads(os.environ[_TOLD]))


def _app(told: dict[str, Any]) -> FastAPI:
    deployed = Deployed(told["folder"], told["runtime"], told["threads"])
    settings = Settings.from_json(told["settings"])
    return create_app(deployed, settings, allowed_hosts=told["hosts"])


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


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's, which lets a client take any time for the head of a request."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(error)

    def _watch(self) -> None:
        """Close the connection unless the head of a request is whole in time."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEADERS_WITHIN, self.transport.close)
