r"""Reproduce the baselines: every recipe on one backbone at matched epochs, as a table.

    python examples/compare_recipes.py                                   (bundled digits, minutes)
    python examples/compare_recipes.py --data cifar10/train.tar --val-data cifar10/test.tar \
        --size 32 --patch 4 --width 96 --smallest-crop 0.6 --stage0-epochs 20 --epochs 20

Stage 0 trains the backbone alone, once. Each recipe then starts from it with its own heads and the
same number of epochs; a method with two stages divides them; methods that differ only in when an image
leaves share a training. The table gives accuracy at fixed layer ratios (blocks of the model over the
mean exit layer), interpolated on the best curve of the recipe's own policy. Interrupted runs go on
where they stopped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F

import lgvit_fast
from lgvit_fast.checkpoints.files import load_weights, save_weights
from lgvit_fast.data import InputSpec
from lgvit_fast.data.batches import Batches, Loader
from lgvit_fast.evaluation import Point, candidates, curves, record, sweep
from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig, train
from lgvit_fast.training.datasets import Data
from lgvit_fast.training.recipes import RECIPES

RATIOS = (1.5, 1.8, 2.2)
KINDS = {
    "Confidence": "confidence",
    "Patience": "patience",
    "PatientConfident": "patient_confident",
}


def at_ratio(points: list[Point], ratio: float) -> float | None:
    """Accuracy at a layer ratio, linear along the best curve there; None where there is no curve."""
    found = []
    for curve in curves(points).values():
        for low, high in itertools.pairwise(curve):
            if low.layer_ratio <= ratio <= high.layer_ratio:
                span = high.layer_ratio - low.layer_ratio
                share = (ratio - low.layer_ratio) / span if span else 0.0
                found.append(low.accuracy + share * (high.accuracy - low.accuracy))
    return max(found, default=None)


def folder_for(name: str) -> str:
    """Where a recipe is trained: the first recipe with the same heads, strategy and stages."""
    wanted = RECIPES[name]
    return next(
        other
        for other, recipe in RECIPES.items()
        if (recipe.heads, recipe.strategy, recipe.stages)
        == (wanted.heads, wanted.strategy, wanted.stages)
    )


def config_for(args: argparse.Namespace, name: str) -> TrainConfig:
    """The training run of a recipe; stage 2 gets a third of the epochs where there is one."""
    name = folder_for(name)
    second = max(1, args.epochs // 3) if RECIPES[name].stages == "both" else 0
    common: dict[str, Any] = {"lr": args.lr, "warmup_epochs": min(1.0, args.epochs / 4)}
    return TrainConfig(
        recipe=name,
        output=str(Path(args.out) / name),
        resume=True,
        seed=args.seed,
        data=args.data,
        val_data=args.val_data,
        batch_size=128,
        val_batch_size=500,
        workers=args.workers,
        crop_scale=(args.smallest_crop, 1.0),
        color_jitter=0.0,
        device=args.device,
        tensorboard=False,
        stage1=Stage1Config(epochs=args.epochs - second, **common),
        stage2=Stage2Config(epochs=max(1, second), lr=args.lr),
    )


def batches(config: TrainConfig, backbone: torch.nn.Module, training: bool) -> Loader:
    """The images that training, or validation, reads."""
    spec = InputSpec.of(backbone)
    source = Data.open(config).sources(spec)[0 if training else 1]
    order = Batches(len(source), config.batch_size, training=training, seed=config.seed)
    return Loader(source, order, config.workers)


def stage0(args: argparse.Namespace) -> torch.nn.Module:
    """The backbone without exits, trained or taken from an earlier run."""
    torch.manual_seed(args.seed)
    config = config_for(args, "sdn")
    classes = len(Data.open(config).class_names) or 10
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=args.size, patch_size=args.patch, embed_dim=args.width, depth=12,
        num_heads=max(1, args.width // 32), num_classes=classes,
    )  # fmt: skip
    file = Path(args.out) / "stage0.safetensors"
    if file.exists():
        model.load_state_dict(load_weights(file))
        return model
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr * 2, weight_decay=0.05)
    loader = batches(config, model, training=True)
    steps = args.stage0_epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr * 2, total_steps=steps)
    for epoch in range(args.stage0_epochs):
        for batch in loader.epoch(epoch):
            loss = F.cross_entropy(
                model(batch.images.to(args.device)), batch.targets.to(args.device)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"stage 0, epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    save_weights(file, model.state_dict())
    return model.cpu()


def main(argv: list[str] | None = None) -> dict[str, list[float | None]]:
    """Train everything and print the table; gives the rows by recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits")
    parser.add_argument("--val-data")
    parser.add_argument("--size", type=int, default=16, help="pixels (default: 16)")
    parser.add_argument("--patch", type=int, default=4, help="pixels (default: 4)")
    parser.add_argument("--width", type=int, default=64, help="channels (default: 64)")
    parser.add_argument("--smallest-crop", type=float, default=0.3, help="share of the area")
    parser.add_argument("--stage0-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12, help="of each recipe (default: 12)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/recipes")
    args = parser.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    backbone = stage0(args)
    rows: dict[str, list[float | None]] = {}
    details: dict[str, Any] = {}
    for name in args.recipes:
        config = config_for(args, name)
        model = lgvit_fast.LGViT(copy.deepcopy(backbone), heads=RECIPES[name].heads)
        model = train(config, model).model
        recording = record(model, batches(config, model.backbone, training=False).epoch())
        kind = KINDS[type(RECIPES[name].policy).__name__]
        points = sweep(recording, candidates(kind, len(model.exits), model.num_classes))
        rows[name] = [recording.final_accuracy, *(at_ratio(points, ratio) for ratio in RATIOS)]
        details[name] = {
            "full_depth_and_ratios": dict(
                zip(("full", *map(str, RATIOS)), rows[name], strict=True)
            ),
            "accuracy_by_layer": dict(zip(recording.layers, recording.accuracies, strict=True)),
            "curve": [point.to_dict() for point in points],
        }
        report = {"arguments": vars(args), "torch": torch.__version__, "recipes": details}
        Path(args.out, "table.json").write_text(json.dumps(report, indent=2) + "\n")
    print("\n| recipe | full depth |", " | ".join(f"{ratio}x" for ratio in RATIOS), "|")
    print("|---" * (len(RATIOS) + 2) + "|")
    for name, row in rows.items():
        cells = ["-" if value is None else f"{100 * value:.2f}" for value in row]
        print(f"| {name} |", " | ".join(cells), "|")
    return rows


if __name__ == "__main__":
    main()
