"""The servers that are compared: the same HTTP around three ways of running a model."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from lgvit_fast.deploy import Deployed
from lgvit_fast.exit_rules import ExitRule, ExitStep, RuleKind
from lgvit_fast.policies import Policy
from lgvit_fast.runtimes.continuous import ContinuousBatcher, Finished

WAYS = ("continuous", "batch at a time", "full model")
EXPORTS = {"full model": "dense"}  # folder of each way; "early" for the others


class TraceInOrder(Policy):
    """Images leave where a trace says, in the order in which they are accepted."""

    def __init__(self, exits: Sequence[int]) -> None:
        self._exits, self._next = exits, 0

    def start_array(self, batch: int) -> Any:
        places = [self._exits[(self._next + i) % len(self._exits)] for i in range(batch)]
        self._next += batch
        return np.array([[0, place] for place in places], np.int32)

    def rule(self, exit_index: int) -> ExitRule:
        return ExitRule(RuleKind.NEVER)

    def decide(self, step: Any, state: Any, exit_index: int) -> Any:
        return ExitStep(step.logits, (state[:, 1] == exit_index) & step.valid, step.valid)

    def __str__(self) -> str:
        return "Trace"


class BatchAtATime(ContinuousBatcher):
    """What a batcher of requests does: nobody gets an answer before the batch's last image."""

    def step(self) -> list[Finished]:
        done = super().step()
        for place in range(1, len(self._queues)):
            batch, self._queues[place] = self._queues[place], []
            if batch:
                done += self._run(place, batch)
        now = self._clock()
        return [
            dataclasses.replace(one, queued=now - began - one.computed)
            for one in done
            for began in [now - one.queued - one.computed]
        ]


def export_both(name: str, folder: Path) -> None:
    """A model with random weights, with its exits ("early") and without ("dense")."""
    import torch

    import lgvit_fast
    from lgvit_fast.deploy.manifest import Manifest, write_segment
    from lgvit_fast.runtimes.segment_graph import segment_graphs

    torch.manual_seed(0)
    model = lgvit_fast.create_model(name, num_classes=100).eval()
    lgvit_fast.export(model, folder / "early")
    manifest = Manifest.load(folder / "early")
    ((_, proto),) = segment_graphs(model, manifest.preprocessing.size, ())
    (folder / "dense").mkdir()
    segment = write_segment(folder / "dense" / "segment_0.onnx", proto.SerializeToString())
    dense = dataclasses.replace(
        manifest, layers=manifest.layers[-1:], heads=(), segments=(segment,), policy=None
    )
    dense.save(folder / "dense")


class Process:
    """One of the servers, listening on loopback."""

    def __init__(self, exported: Path, way: str, **options: Any) -> None:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load_test.servers", str(exported), way, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.search(r"listens on (\d+)", line):
                self.port = int(found[1])
                return
        raise RuntimeError("".join(lines))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        assert self.process.stderr is not None
        self.process.stderr.close()


def main() -> None:
    from lgvit_fast.bench.traces import TRACES
    from lgvit_fast.serve import Settings, create_app
    from lgvit_fast.serve.run import bind

    parser = argparse.ArgumentParser()
    parser.add_argument("exported", type=Path)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--trace", default="0.9")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--queue", type=int, default=256)
    parser.add_argument("--max-wait-ms", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runtime", default="auto")
    args = parser.parse_args()
    folder = args.exported / EXPORTS.get(args.way, "early")
    deployed = Deployed(folder, args.runtime, args.threads)
    if args.way != "full model":
        deployed.policy = TraceInOrder(TRACES[args.trace].exits(1000))
    if args.way == "batch at a time":
        deployed.batcher = lambda size, wait, policies, observe: BatchAtATime(  # type: ignore[method-assign]
            deployed._segments, policies, size, wait, deployed._lock, observe
        )
    settings = Settings(args.batch_size, args.max_wait_ms, args.queue, timeout=120.0)
    with bind("127.0.0.1", 0) as listening:
        server = uvicorn.Server(
            uvicorn.Config(create_app(deployed, settings), log_level="warning", access_log=False)
        )

        async def run() -> None:
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.05)
            print(f"listens on {listening.getsockname()[1]}", file=sys.stderr, flush=True)
            await serving

        asyncio.run(run())


if __name__ == "__main__":
    main()
