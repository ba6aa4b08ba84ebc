"""`lgvit-fast demo`: both training stages, evaluation and pictures, on data that is always there."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lgvit_fast.arguments import UsageError

if TYPE_CHECKING:
    from lgvit_fast.data import Digits
    from lgvit_fast.training import TrainResult

# Digits are easy: the boldest threshold that costs no accuracy lets every image leave at the first
# exit. A cautious one shows what the method is for, images that leave at different depths.
CONFIDENCE = 0.95

_NOTES = """\
Trains a vision transformer of 12 blocks with 8 exits on the 1,797 scanned digits that come with
scikit-learn, holding a fifth of them out, then lets easy images leave early. Two to four minutes on two
CPU cores. OUT keeps the model, some of the images, the report and two pictures.

With --pretrained the model is timm's vit_tiny_patch16_224 as it was trained on ImageNet, and the
pictures are yours: its exits learn from its own answers, without labels. The weights are a file
(--weights), or come from timm's hub or cache.

examples:
  lgvit-fast demo
  lgvit-fast demo --fast --out /tmp/demo      (a few epochs: does everything work?)
  lgvit-fast demo --pretrained --data photos/
  lgvit-fast demo --pretrained --data photos/ --weights vit_tiny.safetensors --min-agreement 90
"""

_PRETRAINED = "vit_tiny_patch16_224"
_HELD_OUT = 0.3  # of the pictures; two thirds of these calibrate the policy
_TIMED = 64  # pictures


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument(
        "--out", default="demo-output", metavar="FOLDER", help="default: demo-output"
    )
    parser.add_argument(
        "--fast", action="store_true", help="train for a few epochs only; the accuracy will be poor"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    group = parser.add_argument_group("a pretrained model")
    group.add_argument("--pretrained", action="store_true", help=f"timm's {_PRETRAINED}")
    group.add_argument(
        "--data", metavar="PATH", help="your pictures: a folder at any depth, or a tar"
    )
    group.add_argument("--weights", metavar="FILE", help="default: timm's hub or cache")
    group.add_argument(
        "--min-agreement",
        type=float,
        metavar="PERCENT",
        help="of the answers that must be the full model's (default: 95; takes about 600 pictures)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, and show what was gained."""
    given = [
        name for name in ("data", "weights", "min_agreement") if getattr(args, name) is not None
    ]
    if args.pretrained:
        if args.data is None:
            raise UsageError("--pretrained needs --data: a folder or tar of your pictures")
        return _pretrained(args)
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} goes with --pretrained")
    return _digits(args)


def _pretrained(args: argparse.Namespace) -> int:
    """Exits without labels for a trained classifier, a policy with a guarantee, and the gain."""
    from lgvit_fast.cli.tables import clock, table, timing_table
    from lgvit_fast.data import InputSpec
    from lgvit_fast.evaluation.timing import compare
    from lgvit_fast.inference import plan_exits
    from lgvit_fast.training import DistillConfig, run_distillation
    from lgvit_fast.training.config import distillation_stage
    from lgvit_fast.training.datasets import Data
    from lgvit_fast.training.distillation import patch_size

    out = Path(args.out)
    config = DistillConfig(
        output=str(out / "model" / "run"),
        init=args.weights or _PRETRAINED,
        model=_PRETRAINED,
        data=args.data,
        min_agreement=95.0 if args.min_agreement is None else args.min_agreement,
        val_fraction=_HELD_OUT,
        seed=args.seed,
        device="cpu",
        stage2=distillation_stage(epochs=1 if args.fast else 5),
    )
    print("The exits learn from the model's own answers; its backbone stays as it is.")
    done = run_distillation(config)
    model, calibration = done.model, done.calibration
    assert calibration is not None
    _, held_out = Data.open(config).sources(InputSpec.of(model.backbone), patch_size(model))
    rows = range(min(_TIMED, len(held_out)))
    images = held_out.__getitems__([(0, row) for row in rows]).images
    left = calibration.certificate.exit_counts
    timings = [
        compare(
            model,
            images,
            batch_size=size,
            runtime="auto",
            exits=plan_exits(model, left, size).exits,
        )
        for size in (1, 32)
    ]

    print(f"\nAgreement with the full model on {done.images} held-out pictures, %")
    head = [f"block {spec.layer}" for spec in model.exits]
    print(table(["", *head], [["exit", *(f"{100 * share:.1f}" for share in done.agreement)]]))
    print(f"\n{calibration}\n\nWall clock, median and quartiles")
    print(timing_table(timings))
    expected = calibration.expected
    print(
        f"\nEarly exit runs {model.num_blocks / expected.layers.value:.2f}x fewer blocks per image, and"
        f" {expected.agreement.value:.1f} % of its answers are the full model's; {clock(timings)}."
        f"\nUse the model:\n  lgvit-fast predict {out / 'model'} {args.data}"
    )
    return 0


def _digits(args: argparse.Namespace) -> int:
    """Both stages from scratch on data that is always there."""
    from lgvit_fast import Confidence
    from lgvit_fast.cli.eval import show, write
    from lgvit_fast.data import Digits, InputSpec
    from lgvit_fast.evaluation import evaluate
    from lgvit_fast.training import digits_recipe, train

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".training-", dir=out) as folder:
        config = digits_recipe(folder)
        config.seed, config.device = args.seed, "cpu"
        config.tensorboard, config.save_every = False, 0
        if args.fast:
            config.stage1.epochs, config.stage1.warmup_epochs = 3, 1
            config.stage2.epochs, config.stage2.warmup_epochs = 1, 0
        print("Stage 1 trains backbone and heads, stage 2 the heads with the backbone as teacher.")
        result = train(config)
    model = result.model
    digits = Digits("validation", InputSpec.of(model.backbone))
    model.policy = Confidence(CONFIDENCE)
    evaluation = evaluate(
        model,
        digits,
        policy=model.policy,
        batch_size=256,
        timing_batches=(1, 32),
        timing_images=len(digits),
        runtime="auto",
        plan=True,
    )
    model.save_pretrained(out / "model")
    samples = _save_samples(digits, out / "samples")

    show(evaluation, model)
    facts = {"model": str(out / "model"), "data": "digits", "training": _training(result)}
    write(evaluation, model, out, facts)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(
        f"\nDone in {minutes} min {seconds} s. Look at {out / 'tradeoff.png'} and {out / 'exits.png'};"
        f" the figures are in {out / 'report.json'}."
        f"\nUse the model:\n  lgvit-fast predict {out / 'model'} {samples}"
    )
    return 0


def _training(result: TrainResult) -> dict[str, dict[str, object]]:
    """The stages for the report."""
    return {
        name: {
            "best_epoch": stage.best_epoch,
            "updates": stage.updates,
            "exit_accuracy": list(stage.accuracy.exits),
            "final_accuracy": stage.accuracy.final,
        }
        for name, stage in result.stages.items()
    }


def _save_samples(digits: Digits, folder: Path, count: int = 20) -> Path:
    """Write some held-out digits as PNG files, for `lgvit-fast predict`."""
    from PIL import Image

    from lgvit_fast.evaluation.plots import denormalise

    folder.mkdir(exist_ok=True)
    batch = digits.__getitems__([(0, position) for position in range(count)])
    pictures = (denormalise(batch.images, digits.spec) * 255).round().byte().numpy()
    for number, (picture, target) in enumerate(zip(pictures, batch.targets.tolist(), strict=True)):
        Image.fromarray(picture).save(folder / f"{number:02}-a-{target}.png")
    return folder
