"""A server under clients that misbehave, and processes of it that are killed.

    python -m benchmarks.load_test.faults --requests 10000 --json faults.json

Of the requests some are whole (one image, or several), some have broken uploads, some come slowly, some
break off in mid-upload or before the answer. From time to time a process of the server is killed.
What must hold: every image of a whole request is answered exactly once and with its own answer, or
refused with 429, or the connection was closed, which may only happen when a process was killed; when
all is over nothing is queued; memory does not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from lgvit_fast.deploy import Deployed

KINDS = {"one": 55, "several": 15, "broken": 10, "slow": 5, "half": 5, "gone": 6, "garbage": 4}
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


def pictures(count: int, size: int) -> list[bytes]:
    """PNG files of random blocks."""
    made = []
    for seed in range(count):
        blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
        made.append(file.getvalue())
    return made


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task")
    return [
        int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()
    ]


def workers(pid: int) -> list[int]:
    """The processes of a server that answer; the other children are Python's own helpers."""
    return [
        child
        for child in children(pid)
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def megabytes(pid: int) -> float:
    """Resident memory of a process's children."""
    total = 0
    for child in workers(pid):
        total += int(Path(f"/proc/{child}/statm").read_text().split()[1])
    return total * PAGE_MB


class Campaign:
    """Many requests at once, and what became of them.

    Args:
        url: of the server.
        files: images, PNG.
        expected: the class of each.
        seed: of what is drawn.
    """

    def __init__(self, url: str, files: list[bytes], expected: list[int], seed: int = 0) -> None:
        self._url, self._files, self._expected = url, files, expected
        self._draw = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.killed_at: list[float] = []

    async def run(
        self, requests: int, at_once: int = 24, every: Callable[[int], None] = lambda number: None
    ) -> None:
        """Send them; `every` is called before each with its number."""
        numbers = iter(range(requests))
        limits = httpx.Limits(max_connections=None)

        async def ask(client: httpx.AsyncClient) -> None:
            for number in numbers:
                every(number)
                (kind,) = self._draw.choices(list(KINDS), list(KINDS.values()))
                began = time.monotonic()
                try:
                    outcome = await getattr(self, f"_{kind}")(client)
                except (httpx.HTTPError, OSError, asyncio.IncompleteReadError):
                    outcome = "closed"
                    if kind in ("one", "several") and not self._was_killed(began):
                        self.wrong.append(f"{kind}: closed, though no process was killed")
                self.outcomes[f"{kind}: {outcome}"] += 1

        async with httpx.AsyncClient(base_url=self._url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(ask(client) for _ in range(at_once)))

    def _was_killed(self, began: float) -> bool:
        """Whether a process died while a request was on its way; told to the client a bit later."""
        return any(began - 5 <= when for when in self.killed_at)

    def _check(self, number: int, answer: dict[str, Any]) -> None:
        if answer.get("class_index") != self._expected[number]:
            self.wrong.append(f"image {number} should be {self._expected[number]}: {answer}")

    async def _one(self, client: httpx.AsyncClient) -> str:
        number = self._draw.randrange(len(self._files))
        kind = {"Content-Type": "image/png"}
        answer = await client.post("/predict", content=self._files[number], headers=kind)
        if answer.status_code == 200:
            self._check(number, answer.json())
        elif answer.status_code != 429:
            self.wrong.append(f"one: {answer.status_code} {answer.text}")
        return str(answer.status_code)

    async def _several(self, client: httpx.AsyncClient) -> str:
        numbers = [self._draw.randrange(len(self._files)) for _ in range(self._draw.randint(2, 6))]
        broken = self._draw.choice([None, 0, len(numbers) - 1])
        form = [
            ("image", ("x.png", self._files[n][: 60 if place == broken else None]))
            for place, n in enumerate(numbers)
        ]
        answer = await client.post("/predict", files=form)
        if answer.status_code == 429:
            return "429"
        rows = [json.loads(line) for line in answer.text.splitlines()]
        if sorted(row["image"] for row in rows) != list(range(len(numbers))):
            self.wrong.append(f"several: {len(numbers)} images, rows {rows}")
            return "wrong"
        for row in rows:
            if row["image"] == broken:
                if row.get("status") != 400:
                    self.wrong.append(f"a broken image of several: {row}")
            else:
                self._check(numbers[row["image"]], row)
        return "200"

    async def _broken(self, client: httpx.AsyncClient) -> str:
        data = self._draw.choice([b"", b"no image", self._files[0][:100], os.urandom(2000)])
        answer = await client.post("/predict", content=data, headers={"Content-Type": "image/png"})
        if answer.status_code not in (400, 429):
            self.wrong.append(f"broken: {answer.status_code} {answer.text}")
        return str(answer.status_code)

    async def _slow(self, client: httpx.AsyncClient) -> str:
        number = self._draw.randrange(len(self._files))
        data = self._files[number]

        async def parts() -> Any:
            for start in range(0, len(data), len(data) // 3 + 1):
                await asyncio.sleep(0.05)
                yield data[start : start + len(data) // 3 + 1]

        answer = await client.post(
            "/predict", content=parts(), headers={"Content-Type": "image/png"}
        )
        if answer.status_code == 200:
            self._check(number, answer.json())
        return str(answer.status_code)

    async def _half(self, client: httpx.AsyncClient) -> str:
        return await self._break_off(self._files[0][:200], len(self._files[0]))

    async def _gone(self, client: httpx.AsyncClient) -> str:
        return await self._break_off(self._files[0], len(self._files[0]))

    async def _garbage(self, client: httpx.AsyncClient) -> str:
        _, writer = await self._connect()
        writer.write(os.urandom(64) + b"\r\n\r\n")
        await writer.drain()
        writer.close()
        return "sent"

    async def _break_off(self, data: bytes, length: int) -> str:
        _, writer = await self._connect()
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        writer.transport.abort()
        return "sent"

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        url = httpx.URL(self._url)
        return await asyncio.open_connection("127.0.0.1", url.port)


def campaign(folder: Path, requests: int, kills: int, options: list[str]) -> dict[str, Any]:
    """Start a server of two processes on an exported model, send requests, look at what is left."""
    from tests.serve.server import Server

    size = Deployed(folder).manifest.preprocessing.size[0]
    files = pictures(64, size)
    deployed = Deployed(folder, threads=1)
    inputs = np.stack([deployed.manifest.preprocessing.read(io.BytesIO(f)) for f in files])
    expected = deployed(inputs).prediction.tolist()
    server = Server(folder, "--workers", "2", *options)
    memory: list[float] = []
    try:
        made = Campaign(server.url, files, expected)
        when = {requests * (i + 1) // (kills + 1) for i in range(kills)}

        def every(number: int) -> None:
            if number in when:
                made.killed_at.append(time.monotonic())
                os.kill(made._draw.choice(workers(server.process.pid)), signal.SIGKILL)
            if number % 200 == 0:
                memory.append(megabytes(server.process.pid))

        began = time.monotonic()
        asyncio.run(made.run(requests, every=every))
        seconds = time.monotonic() - began
        deadline = time.monotonic() + 60
        while "lgvit_queue_images 0.0" not in server.client.get("/metrics").text:
            if time.monotonic() > deadline:
                made.wrong.append("images are still queued")
                break
            time.sleep(0.2)
        told = {httpx.get(f"{server.url}/stats").text for _ in range(8)}
        if len(told) > 1:
            made.wrong.append(f"the processes do not count together: {told}")
    finally:
        code = server.stop()
    return {
        "requests": requests,
        "seconds": round(seconds, 1),
        "killed": len(made.killed_at),
        "outcomes": dict(sorted(made.outcomes.items())),
        "wrong": made.wrong,
        "exit_code": code,
        "tracebacks": sum("Traceback" in line for line in server.lines),
        "resident_mb": [round(x, 1) for x in memory],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from tests.deploy import exports

    found = campaign(exports.folder(), args.requests, args.kills, ["--queue", "48"])
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
