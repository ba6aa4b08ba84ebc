"""A real server process, and what its tests send it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 40), form: str = "PNG") -> bytes:
    """An image file of random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


class Server:
    """`lgvit-fast serve` on a free port."""

    def __init__(self, folder: Path, *options: str, command: tuple[str, ...] = ()) -> None:
        start = command or (sys.executable, "-m", "lgvit_fast", "serve")
        self.process = subprocess.Popen(
            [*start, str(folder), "--port", "0", "--threads", "1", *options],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stderr is not None
        self.lines: list[
            str
        ] = []  # what it says; read at once, else it stops when the pipe is full
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        self._reader = threading.Thread(target=self.lines.extend, args=(self.process.stderr,))
        self._reader.start()
        self.client = httpx.Client(base_url=self.url, timeout=30)
        while self.client.get("/readyz").status_code != 200:
            pass

    def predict(self, *files: bytes, **options: object) -> httpx.Response:
        """Files in one form."""
        form = [("image", (f"{i}.png", data)) for i, data in enumerate(files)]
        return self.client.post("/predict", files=form, **options)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    """A server that is stopped in the end."""
    server = Server(folder, *options)
    try:
        yield server
    finally:
        server.stop()
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)
