"""`lgvit_fast.scale.Predictor` on one actor and on two, beside what the simulation says.

    python -m benchmarks.scale_ray --json benchmarks/results/cpu_scale_ray.json

Every actor has one thread. The images are files, read in the actors; the recorded trace says where they
leave, so that the weights do not matter. Costs are measured in one process before Ray is started, as
processor time, which other work on the machine changes little. The time of a run is that from the first
batch's beginning to the last one's end: actors are warm by then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import ray
import torch
from PIL import Image

import lgvit_fast
from benchmarks.simulate_scaling import DEVICES, simulate_calls
from lgvit_fast.bench.traces import REAL_TRACE, Trace
from lgvit_fast.deploy import Deployed
from lgvit_fast.inference import Costs
from lgvit_fast.machine import machine
from lgvit_fast.policies import Confidence
from lgvit_fast.scale import Predictor

ROUNDS = 3  # of which costs are the median


class Timed(Predictor):
    """Adds to each row when its batch began and ended, and the processor seconds it took."""

    def __call__(self, batch: Any) -> pyarrow.Table:
        began, processor = time.time(), time.process_time()
        rows = super().__call__(batch)
        taken = {
            "began": began,
            "ended": time.time(),
            "processor": (time.process_time() - processor) / len(rows),
        }
        for name, value in taken.items():
            rows = rows.append_column(name, pyarrow.array([value] * len(rows)))
        return rows


def make_files(folder: Path, count: int) -> list[str]:
    """Smooth pictures of 500 x 375 pixels, as JPEG."""
    noise, paths = np.random.default_rng(0), []
    for number in range(count):
        small = Image.fromarray(noise.integers(0, 256, (12, 16, 3), np.uint8))
        path = folder / f"{number:05}.jpg"
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return paths


def measure_costs(deployed: Deployed, paths: Sequence[str], batch_size: int) -> Costs:
    """Processor seconds of each graph, at batches of 1 and up; reading files counts as embedding."""
    read = deployed.manifest.preprocessing.read
    began = time.process_time()
    images = [read(path) for path in paths[:batch_size]]
    reading = (time.process_time() - began) / batch_size
    sizes = [1]
    while sizes[-1] < batch_size:
        sizes.append(min(2 * sizes[-1], batch_size))
    blocks: list[list[float]] = [[] for _ in range(len(deployed.exits) + 1)]
    for size in sizes:
        batcher = deployed.batcher(size, 0.0, [Confidence(1.0)])  # nobody leaves
        taken: list[list[float]] = [[] for _ in blocks]
        for _ in range(ROUNDS + 1):
            for number in range(size):
                batcher.add(images[number], number)
            for place in taken:  # a step runs a graph on all
                began = time.process_time()
                batcher.step()
                place.append(time.process_time() - began)
        for graph, rounds in zip(blocks, taken, strict=True):
            graph.append(statistics.median(rounds[1:]))
    nothing = tuple(0.0 for _ in sizes)
    return Costs(
        tuple(sizes),
        tuple(reading * size for size in sizes),
        tuple(map(tuple, blocks)),
        (nothing,) * len(blocks),
    )


def run(folder: Path, paths: Sequence[str], trace: Trace, batch_size: int, actors: int) -> Any:
    """Seconds of wall clock, and of the processor, for a data set on so many actors."""
    batches = len(paths) // batch_size
    files = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=batches)
    rows = files.map_batches(
        Timed,
        fn_constructor_args=(str(folder),),
        fn_constructor_kwargs={"policy": trace.policy(batch_size, trace.layers[:-1])},
        batch_size=batch_size,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
    ).take_all()
    assert sorted(row["path"] for row in rows) == sorted(paths)
    assert not any(row["error"] for row in rows)
    wall = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
    return wall, sum(row["processor"] for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=128, help="a multiple of the batch size")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="the numbers of actors take turns")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.images % args.batch_size:
        parser.error("--images is no multiple of --batch-size")
    trace, whole = REAL_TRACE, args.images // args.batch_size
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        model = lgvit_fast.create_model(args.model, exits=trace.layers[:-1], num_classes=100)
        folder = lgvit_fast.export(model.eval(), Path(temporary, "exported"))
        paths = make_files(Path(temporary), args.images)
        costs = measure_costs(Deployed(folder, threads=1), paths, args.batch_size)
        ray.init(
            address="local",
            num_cpus=max(args.actors),
            include_dashboard=False,
            log_to_driver=False,
        )
        ray.data.DataContext.get_current().wait_for_min_actors_s = 120  # all begin together
        ray.data.DataContext.get_current().enable_progress_bars = False
        taken: dict[int, list[tuple[float, float]]] = {actors: [] for actors in args.actors}
        for _ in range(args.rounds):
            for actors, runs in taken.items():
                runs.append(run(folder, paths, trace, args.batch_size, actors))
                print(f"{actors} actors: {runs[-1][0]:.2f} s", file=sys.stderr, flush=True)
        ray.shutdown()
    exits = trace.exits(args.batch_size) * whole
    rows = []
    for actors in sorted({*args.actors, *DEVICES}):
        row = {"actors": actors, "predicted": simulate_calls(costs, exits, args.batch_size, actors)}
        if actors in taken:
            wall, processor = zip(*taken[actors], strict=True)
            row |= {"measured": list(wall), "processor": list(processor)}
        rows.append(row)
    print("| actors | predicted, s | measured, s | processor, s |")
    print("| ---: | ---: | ---: | ---: |")
    for row in rows:
        if "measured" in row:
            wall, processor = (statistics.median(row[name]) for name in ("measured", "processor"))
            print(f"| {row['actors']} | {row['predicted']:.2f} | {wall:.2f} | {processor:.2f} |")
    alone = next(row for row in rows if row["actors"] == min(args.actors))
    if args.json:
        content = {
            "model": args.model,
            "trace": trace.name,
            "batch_size": args.batch_size,
            "images": args.images,
            "real_seconds": statistics.median(alone["processor"]),
            "simulated_seconds": alone["predicted"],
            "costs": dataclasses.asdict(costs),
            "rows": rows,
            "machine": machine(),
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
