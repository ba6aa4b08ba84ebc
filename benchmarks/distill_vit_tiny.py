"""Exits for ViT-Ti/16 from unlabelled pictures: agreement, accuracy, and what is certified of them.

    python benchmarks/distill_vit_tiny.py --weights WEIGHTS.safetensors --images train.tar \
        --photos photos.tar --work FOLDER --json benchmarks/results/distill_vit_tiny.json

WEIGHTS are those of timm's `vit_tiny_patch16_224`; IMAGES any pictures, their classes not looked at;
PHOTOS class folders named by ImageNet's class numbers, which take no part in training. The same command
with `--resume` goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import lgvit_fast
from lgvit_fast.data import Batches, ImageSource, InputSpec, Loader, eval_transform, open_dataset
from lgvit_fast.evaluation import Recording, calibrate, record
from lgvit_fast.machine import machine
from lgvit_fast.training import DistillConfig, run_distillation
from lgvit_fast.training.config import distillation_stage
from lgvit_fast.training.datasets import Data

NAME = "vit_tiny_patch16_224"
GOALS = (99.0, 98.0, 95.0, 90.0, 85.0)


class Some:
    """Every n-th item of a data set, so that all its classes occur."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset = dataset
        self.places = [round(i * len(dataset) / count) for i in range(min(count, len(dataset)))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.places[index]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--work", required=True, help="folder of the run and the model")
    parser.add_argument("--json", required=True)
    parser.add_argument("--count", type=int, default=4000, help="images to take")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cache-folder", help="keep the tokens there, for a second run")
    parser.add_argument("--heads", nargs="+", default=None)
    parser.add_argument("--no-warm-start", action="store_true")
    parser.add_argument("--cache", type=int, default=10**10, help="bytes")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    config = DistillConfig(
        output=str(Path(args.work) / "run"),
        init=args.weights,
        model=NAME,
        heads=args.heads,
        data=args.images,
        cache=args.cache or None,
        warm_start=not args.no_warm_start,
        hflip=0.0,  # one variant of each image: the backbone runs once
        resume=args.resume,
        device="cpu",
        workers=0,
        batch_size=args.batch_size,
        cache_folder=args.cache_folder,
        stage2=distillation_stage(epochs=args.epochs, lr=args.lr),
    )
    started, used = time.perf_counter(), time.process_time()
    data = Data(config, Some(open_dataset(args.images), args.count), None, [])
    done = run_distillation(config, data=data)
    seconds, processor = time.perf_counter() - started, time.process_time() - used

    recording = record(done.model, batches(args.photos, done.model))
    layers = list(recording.layers)
    right = recording.logits.argmax(-1) == recording.labels
    same = recording.logits.argmax(-1) == recording.logits[-1].argmax(-1)
    curve = [goal(recording, percent) for percent in GOALS]
    rows = Path(config.output, "stage2", "metrics.jsonl").read_text().splitlines()
    report = {
        "machine": machine(),
        "images": {"count": len(data.train), "held out": done.images, "labels": "not read"},
        "photos": len(recording),
        "config": {k: v for k, v in config.to_dict().items() if k in FACTS},
        "hours": seconds / 3600,
        "processor hours": processor / 3600,
        "layers": layers,
        "held-out agreement": [100 * share for share in done.agreement],
        "photo agreement": (100 * same.double().mean(1)).tolist(),
        "photo accuracy": (100 * right.double().mean(1)).tolist(),
        "certified": curve,
        "validations": [json.loads(row) for row in rows if '"validation"' in row],
    }
    Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    print(tables(report))


FACTS = ("model", "exits", "heads", "batch_size", "val_fraction", "seed", "warm_start", "stage2")


def tables(report: dict[str, Any]) -> str:
    """The figures as the two tables of docs/distill.md."""

    def row(name: str, cells: list[Any]) -> str:
        return f"| {name} | " + " | ".join(str(cell) for cell in cells) + " |"

    def percents(shares: list[float]) -> list[str]:
        return [f"{share:.1f}" for share in shares]

    checks = report["validations"]
    start, best = checks[0], max(checks, key=lambda check: sum(check["exit_agreement"]))
    lines = [
        row("after block", [*report["layers"][:-1], "final"]),
        row("---", ["---:"] * len(report["layers"])),
    ]
    for name, found in (("held out, at the start", start), ("held out, best epoch", best)):
        cells = percents([100 * share for share in found["exit_agreement"]])
        lines.append(row(f"agreement, {name}", [*cells, "100"]))
    for name in ("agreement", "accuracy"):
        lines.append(row(f"{name}, photos", percents(report[f"photo {name}"])))
    lines += ["", row("agreement asked", ["agreement", "mean layers", "accuracy", "points lost"])]
    lines.append(row("---:", ["---:"] * 4))
    for found in report["certified"]:
        if "error" in found or not found["certified"] or found["certified"] == 100:
            cells = ["not shown", 12, "", ""]
        else:
            names = ("agreement", "mean layers", "accuracy", "drop")
            cells = [f"{found[name]:.2f}" for name in names]
        lines.append(row(f"{found['min_agreement']:g} %", cells))
    return "\n".join(lines)


def batches(photos: str, model: lgvit_fast.LGViT) -> Any:
    """The photos with their ImageNet classes, which are the names of their folders."""
    spec, dataset = InputSpec.of(model.backbone), open_dataset(photos)
    numbers = torch.tensor([int(name) for name in lgvit_fast.data.class_names(dataset)])
    source = ImageSource(dataset, eval_transform(spec))
    for batch in Loader(source, Batches(len(source), 50, training=False)).epoch():
        yield batch._replace(targets=numbers[batch.targets])


def goal(recording: Recording, percent: float) -> dict[str, Any]:
    """What a calibration on one half of the photos certifies, and what it does to that half."""
    try:
        found = calibrate(recording, min_agreement=percent)
    except ValueError as error:
        return {"min_agreement": percent, "error": str(error)}
    expected, certificate = found.expected, found.certificate
    assert expected.accuracy is not None and expected.drop is not None
    return {
        "min_agreement": percent,
        "certified": certificate.bound,
        "policy": str(found.policy),
        "mean layers": expected.layers.value,
        "agreement": expected.agreement.value,
        "accuracy": expected.accuracy.value,
        "drop": expected.drop.value,
        "images": certificate.images,
        "note": certificate.note,
    }


if __name__ == "__main__":
    main()
