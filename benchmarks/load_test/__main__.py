"""Open-loop load on loopback: what early exit gains a server.

    python -m benchmarks.load_test --model vit_tiny_patch16_224 --json load.json

The same server runs three ways: each image answered when it leaves, with queues that refill
("continuous"); early exit a batch at a time, whose answers come with the last image; the full model.
Images leave where a recorded trace says. First each server's capacity is measured (requests that follow
one another without a pause, many at once), then requests arrive at random times (a Poisson process) at
shares of it. Goodput: images a second answered within `--within` seconds. A server is killed when its
turn is over, so that only one runs at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import math
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.load_test.servers import WAYS, Process, export_both
from lgvit_fast.bench.traces import TRACES
from lgvit_fast.machine import machine

LOADS = (0.5, 0.8, 1.0, 1.2)


@dataclass
class Row:
    """Requests of one image each at one rate."""

    way: str
    load: float  # share of this server's own capacity
    rate: float  # arrivals a second
    sent: int
    answered: int
    rejected: int  # 429
    lost: int  # neither: must be 0
    goodput: float  # answered in time, a second
    p50_ms: float
    p99_ms: float


def pictures(count: int) -> list[bytes]:
    """JPEG files of 256 x 256 pixels."""
    made = []
    for seed in range(count):
        blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(blocks).resize((256, 256)).save(file, "JPEG")
        made.append(file.getvalue())
    return made


async def post(client: httpx.AsyncClient, data: bytes) -> int:
    """The status of one request; 0 if its connection failed."""
    try:
        answer = await client.post("/predict", content=data, headers={"Content-Type": "image/jpeg"})
    except httpx.HTTPError:
        return 0
    return answer.status_code


def client(port: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=180, limits=limits)


async def capacity(port: int, files: list[bytes], seconds: float, at_once: int = 32) -> float:
    """Images a second when there is always a next one."""
    async with client(port) as connected:
        stop, answered = time.perf_counter() + seconds, 0

        async def ask() -> None:
            nonlocal answered
            while time.perf_counter() < stop:
                status = await post(connected, random.choice(files))
                answered += status == 200

        began = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(at_once)))
        return answered / (time.perf_counter() - began)


async def open_loop(
    port: int, files: list[bytes], rate: float, seconds: float, within: float, seed: int
) -> dict[str, Any]:
    """Requests that arrive whether or not those before them have been answered."""
    draw = random.Random(seed)
    found: list[tuple[int, float]] = []
    async with client(port) as connected:
        began, due, running = time.perf_counter(), 0.0, set()

        async def ask(due: float) -> None:
            status = await post(connected, draw.choice(files))
            # From when it was due: a client that falls behind must not flatter the server.
            found.append((status, time.perf_counter() - began - due))

        while (due := due + draw.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            running.add(asyncio.create_task(ask(due)))
        await asyncio.gather(*running)
    times = np.array([latency for status, latency in found if status == 200] or [np.nan])
    return {
        "rate": rate,
        "sent": len(found),
        "answered": sum(status == 200 for status, _ in found),
        "rejected": sum(status == 429 for status, _ in found),
        "lost": sum(status not in (200, 429) for status, _ in found),
        "goodput": int((times <= within).sum()) / seconds,
        "p50_ms": 1000 * float(np.quantile(times, 0.5)),
        "p99_ms": 1000 * float(np.quantile(times, 0.99)),
    }


def table(rows: list[Row]) -> str:
    lines = [
        "| server | load | arrivals/s | goodput/s | p50 ms | p99 ms | answered | 429 | lost |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.way} | {r.load:g} | {r.rate:.1f} | {r.goodput:.1f} | {r.p50_ms:.0f} | {r.p99_ms:.0f} |"
        f" {r.answered} | {r.rejected} | {r.lost} |"
        for r in rows
    ]
    return "\n".join(lines)


def at_equal_p99(rows: list[Row], way: str, p99_ms: float) -> float:
    """The goodput of a way at the load at which its p99 is so long.

    Between two loads that were measured it is interpolated, by the logarithm of p99; it is not
    extrapolated.
    """
    mine = [row for row in rows if row.way == way]
    for before, after in itertools.pairwise(mine):
        if before.p99_ms <= p99_ms < after.p99_ms:
            part = math.log(p99_ms / before.p99_ms) / math.log(after.p99_ms / before.p99_ms)
            return before.goodput + part * (after.goodput - before.goodput)
    return mine[-1].goodput if mine[-1].p99_ms <= p99_ms else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--trace", choices=sorted(TRACES), default="0.9")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--loads", nargs="+", type=float, default=LOADS)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--within", type=float, default=1.0, help="seconds that count as in time")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    files, rows, capacities = pictures(32), [], {}
    with tempfile.TemporaryDirectory() as folder:
        export_both(args.model, Path(folder))
        for way in args.ways:
            options = {"batch_size": args.batch_size, "queue": args.queue}
            with Process(
                Path(folder), way, trace=args.trace, runtime=args.runtime, **options
            ) as server:
                asyncio.run(capacity(server.port, files, 2.0))
                capacities[way] = asyncio.run(capacity(server.port, files, args.seconds / 2))
                print(f"{way}: {capacities[way]:.1f} images/s at most", flush=True)
                for seed, load in enumerate(args.loads):
                    made = open_loop(
                        server.port, files, load * capacities[way], args.seconds, args.within, seed
                    )
                    rows.append(Row(way, load, **asyncio.run(made)))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
    trace = TRACES[args.trace]
    here = machine()
    where = f"{here['processor']} ({' '.join(here['instructions'])}), {here['cores']} cores"
    print(f"\n{where}; {args.model}, trace {trace}\n\n{table(rows)}")
    dense = [r for r in rows if r.way == "full model" and r.load == 0.8]
    if dense:
        for way in args.ways:
            got = at_equal_p99(rows, way, dense[0].p99_ms)
            print(
                f"goodput at a p99 of {dense[0].p99_ms:.0f} ms, {way}: {got:.1f} images/s,"
                f" {got / dense[0].goodput:.2f}x of the full model's"
            )
    if args.json:
        about = {"machine": here, "model": args.model, "trace": asdict(trace)}
        content = {**about, "capacities": capacities, "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
