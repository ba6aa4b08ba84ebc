"""What the token cache of `distill` saves: processor time of updates on pictures and on tokens.

    python benchmarks/token_cache.py --weights WEIGHTS.safetensors --images train.tar --json cache.json

Both sides take turns on one thread, batch after batch. Loading and augmenting the pictures is in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lgvit_fast
from lgvit_fast.checkpoints import from_timm
from lgvit_fast.data import ImageSource, InputSpec, eval_transform, open_dataset
from lgvit_fast.machine import machine
from lgvit_fast.training.config import DistillConfig, distillation_stage
from lgvit_fast.training.datasets import train_transform
from lgvit_fast.training.stages import Stage2
from lgvit_fast.training.token_cache import cached

NAME = "vit_tiny_patch16_224"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)

    model = from_timm(args.weights, NAME)
    config, spec = DistillConfig(), InputSpec.of(model.backbone)
    dataset, places = open_dataset(args.images), range(args.batch_size * args.turns)
    moving = ImageSource(dataset, train_transform(config, spec), positions=places, labelled=False)
    fixed = ImageSource(dataset, eval_transform(spec), positions=places, labelled=False)
    step = update(model)
    with tempfile.TemporaryDirectory() as folder:
        model.eval()
        start = time.process_time()
        tokens = cached(Path(folder), model, fixed, limit=10**10, last=False, mirror=False)
        built = 1000 * (time.process_time() - start) / len(places)
        model.train()
        turns: dict[str, list[float]] = {"pictures": [], "tokens": []}
        for turn in range(args.turns):
            keys = [(0, turn * args.batch_size + i) for i in range(args.batch_size)]
            for name, source in (("pictures", moving), ("tokens", tokens)):
                start = time.process_time()
                step(source.__getitems__(keys).images)
                turns[name].append(1000 * (time.process_time() - start) / args.batch_size)
    kept = {name: statistics.median(values[1:]) for name, values in turns.items()}
    report = {
        "machine": machine(),
        "model": NAME,
        "exits": [f"{spec.head} after block {spec.layer}" for spec in model.exits],
        "batch_size": args.batch_size,
        "bytes an image": tokens.num_bytes // len(tokens),
        "ms an image, building": built,
        "ms an image, an update on pictures": kept["pictures"],
        "ms an image, an update on tokens": kept["tokens"],
        "turns": turns,
    }
    Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "machine"}, indent=1))


def update(model: lgvit_fast.LGViT) -> Callable[[Any], None]:
    """One update of the exits."""
    stage = Stage2(model, distillation_stage(), labelled=False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    targets = torch.empty(0)

    def step(images: Any) -> None:
        loss, _ = stage(images.to(torch.device("cpu")), targets, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
