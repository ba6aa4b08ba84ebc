"""`lgvit-fast demo`: both training stages, evaluation and pictures, on data that is always there."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

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

examples:
  lgvit-fast demo
  lgvit-fast demo --fast --out /tmp/demo      (a few epochs: does everything work?)
"""


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


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, and show what was gained."""
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
        timing_batches=(32, 256),
        timing_images=len(digits),
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
