"""Past one device, simulated: the stream engine on 1 to 64 devices with segment times measured on one.

    python benchmarks/simulate_scaling.py                       # measures this machine, then simulates
    python benchmarks/simulate_scaling.py --costs costs.json    # simulates with times measured before

Two layouts. Replicas: every device has the whole model and its share of the images. Split: each device
has a run of consecutive segments (several devices may have the same), and tokens move between them.
The simulation follows the rules of `lgvit_fast.inference.streaming`: the deepest full batch runs first,
partial batches run only when no more images can come. It is calibrated against a real run.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import lgvit_fast
from lgvit_fast.bench.traces import REAL_TRACE, Trace
from lgvit_fast.inference import Costs, Engine, measure_costs, stream
from lgvit_fast.machine import machine

DEVICES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Outcome:
    """A simulated run: seconds to the last answer, and the share of them the devices worked."""

    seconds: float
    busy: float


def simulate(
    costs: Costs,
    exits: Sequence[int],
    batch_size: int,
    hosted: Sequence[range],
    transfer: float = 0.0,
) -> Outcome:
    """Answer images on devices.

    Args:
        costs: seconds of the parts of the model.
        exits: the exit (from 0) of each image, in the order they come.
        batch_size: images a segment waits for.
        hosted: for each device, the segments it has.
        transfer: seconds to move an image's tokens to another device; the receiver waits for it.
    """
    num_segments = len(costs.blocks)
    waiting: list[list[int]] = [[] for _ in range(num_segments)]
    running = [0] * num_segments
    source = len(exits)
    free = [(0.0, device) for device in range(len(hosted))]
    done: list[tuple[float, int, int, list[int]]] = []  # time, device, segment, exits of the images
    idle: set[int] = set()
    now = worked = 0.0

    def choose(device: int) -> int | None:
        nonlocal source
        for segment in reversed(hosted[device]):
            if len(waiting[segment]) >= batch_size:
                return segment
        if 0 in hosted[device] and source:
            taken = min(batch_size - len(waiting[0]), source)
            waiting[0].extend(exits[len(exits) - source : len(exits) - source + taken])
            source -= taken
            return 0
        if source:
            return None
        for segment in hosted[device]:  # no more will come: nothing shallower is on its way
            shallower = any(running[: segment + 1]) or any(map(len, waiting[:segment]))
            if waiting[segment] and not (shallower and len(hosted) > 1):
                return segment
        return None

    def start(device: int) -> None:
        nonlocal worked
        segment = choose(device)
        if segment is None:
            idle.add(device)
            return
        rows, waiting[segment] = waiting[segment][:batch_size], waiting[segment][batch_size:]
        seconds = costs.at(costs.blocks[segment], len(rows))
        seconds += costs.at(costs.heads[segment], len(rows))
        if segment == 0:
            seconds += costs.at(costs.embed, len(rows))
        elif segment == hosted[device].start:
            seconds += transfer * len(rows)
        worked += seconds
        running[segment] += 1
        heapq.heappush(done, (now + seconds, device, segment, rows))

    for _, device in free:
        start(device)
    while done:
        now, device, segment, rows = heapq.heappop(done)
        running[segment] -= 1
        if segment + 1 < num_segments:
            waiting[segment + 1] += [exit for exit in rows if exit > segment]
        for other in (device, *sorted(idle)):
            idle.discard(other)
            start(other)
    return Outcome(now, worked / (now * len(hosted)))


def simulate_calls(costs: Costs, exits: Sequence[int], batch_size: int, devices: int) -> float:
    """Seconds to answer images in batches that stay together, each on the next device that is free.

    That is what `lgvit_fast.scale.Predictor` does: a batch that loses images is not refilled.
    """
    free = [0.0] * devices
    for start in range(0, len(exits), batch_size):
        batch = exits[start : start + batch_size]
        seconds = costs.at(costs.embed, len(batch))
        for segment, (blocks, head) in enumerate(zip(costs.blocks, costs.heads, strict=True)):
            rows = sum(exit >= segment for exit in batch)
            seconds += costs.at(blocks, rows) + costs.at(head, rows)
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def split(costs: Costs, trace: Trace, batch_size: int, devices: int, parts: int = 4) -> list[range]:
    """The model in so many parts (fewer on fewer devices), each on one device or several.

    The choice that makes the busiest device least busy, by dynamic programming.
    """
    total = sum(trace.images)
    arriving = [sum(trace.images[i:]) / total for i in range(len(trace.images))]
    full = [
        share * (costs.at(block, batch_size) + costs.at(head, batch_size))
        for share, block, head in zip(arriving, costs.blocks, costs.heads, strict=True)
    ]
    full[0] += costs.at(costs.embed, batch_size)
    last = len(full)

    @cache
    def best(first: int, left: int, parts: int) -> tuple[float, tuple[range, ...]]:
        if first == last or not parts:
            return (0.0 if first == last and not parts else float("inf")), ()
        options = []
        for stop in range(first + 1, last + 1):
            load = sum(full[first:stop])
            for count in range(1, left - parts + 2):
                rest, groups = best(stop, left - count, parts - 1)
                options.append((max(load / count, rest), (range(first, stop),) * count + groups))
        return min(options, key=lambda option: option[0])

    return list(best(0, devices, min(devices, parts, last))[1])


def table(
    costs: Costs, trace: Trace, batch_size: int, images: int, transfer: float
) -> list[dict[str, float]]:
    """Throughput on 1 to 64 devices, as multiples of one device's."""
    whole = range(len(costs.blocks))
    exits = trace.exits(images)
    alone = simulate(costs, exits, batch_size, [whole]).seconds
    rows = []
    for devices in DEVICES:
        replicas = max(
            simulate(costs, exits[i::devices], batch_size, [whole]).seconds for i in range(devices)
        )
        divided = simulate(
            costs, exits, batch_size, split(costs, trace, batch_size, devices), transfer
        )
        rows.append(
            {
                "devices": devices,
                "replicas": alone / replicas,
                "replica_efficiency": alone / replicas / devices,
                "split": alone / divided.seconds,
                "split_efficiency": alone / divided.seconds / devices,
                "split_busy": divided.busy,
            }
        )
    return rows


def measure(name: str, trace: Trace, batch_size: int, images: int) -> tuple[Costs, float, float]:
    """Costs of a model here, and seconds of a real stream beside those the simulation says."""
    torch.manual_seed(0)
    model = lgvit_fast.create_model(name, exits=trace.layers[:-1], num_classes=100).eval()
    engine = Engine(model, batch_size, "torch")
    size = model.pretrained_cfg["input_size"]
    given = torch.randn(images, *size)
    policy = trace.policy(images, trace.layers[:-1])
    costs = measure_costs(model, batch_size)
    engine(given[:batch_size], policy.part(0, batch_size))
    real = float("inf")
    for _ in range(3):  # the least, as for the costs
        answers = stream(
            engine, given.split(batch_size), batch_size, order="completion", policy=policy
        )
        start = time.perf_counter()
        for _ in answers:
            pass
        real = min(real, time.perf_counter() - start)
    whole = [range(len(costs.blocks))]
    return costs, real, simulate(costs, trace.exits(images), batch_size, whole).seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--costs", type=Path, help="json of an earlier --json, or of scale_ray's")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=50_000, help="to answer in the simulation")
    parser.add_argument("--calibrate", type=int, default=64, help="images of the real run")
    parser.add_argument(
        "--transfer", type=float, default=0.0, help="seconds to move an image's tokens (split)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trace = REAL_TRACE
    if args.costs:
        kept = json.loads(args.costs.read_text())
        lists = {
            k: v if k in ("batches", "embed") else map(tuple, v) for k, v in kept["costs"].items()
        }
        costs = Costs(**{key: tuple(value) for key, value in lists.items()})
        real, predicted = kept["real_seconds"], kept["simulated_seconds"]
    else:
        costs, real, predicted = measure(args.model, trace, args.batch_size, args.calibrate)
    rows = table(costs, trace, args.batch_size, args.images, args.transfer)
    print(
        f"one device: {real:.2f} s measured, {predicted:.2f} s simulated ({predicted / real:.2f}x)"
    )
    print("| devices | replicas | efficiency | split | efficiency |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['devices']} | {row['replicas']:.2f}x | {row['replica_efficiency']:.2f} |"
            f" {row['split']:.2f}x | {row['split_efficiency']:.2f} |"
        )
    if args.json:
        content = {
            "model": args.model,
            "trace": trace.name,
            "batch_size": args.batch_size,
            "images": args.images,
            "transfer": args.transfer,
            "real_seconds": real,
            "simulated_seconds": predicted,
            "costs": dataclasses.asdict(costs),
            "rows": rows,
            "machine": machine(),
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
