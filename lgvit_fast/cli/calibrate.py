"""`lgvit-fast calibrate`: a threshold with a guarantee, and the certificate that says what it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lgvit_fast.arguments import UsageError
from lgvit_fast.cli.eval import add_images, open_images, show_progress
from lgvit_fast.cli.options import (
    ON_THE_HUB,
    add_compute,
    autocast_of,
    is_exported,
    load_exported,
    load_model,
)

_NOTES = """\
Splits the images into halves, makes candidates on one, from cautious to bold, and tests them on the
other, one by one, until one is not shown to keep the goal. If the images are like those to come, the
policy chosen breaks the goal with probability at most 100 - CONFIDENCE percent. Use images that took no
part in training.

--max-drop needs images with classes; --min-agreement needs only images. A budget certifies nothing of
the accuracy. The policy and its certificate are written into the model's folder; of an exported model
they are those of its own scores, in the precision it was exported in.

examples:
  lgvit-fast calibrate run/stage2/best --data photos/calibration --max-drop 1
  lgvit-fast calibrate run/stage2/best --data photos/calibration --max-drop 1 --kind learned
  lgvit-fast calibrate run/stage2/best --data photos --unlabelled --min-agreement 98 --confidence 99
  lgvit-fast calibrate run/stage2/best --data photos --budget-layers 6 --dry-run
"""

_GOALS = ("max_drop", "min_agreement", "budget_layers", "budget_ms")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument(
        "model", metavar="MODEL_FOLDER", help="a saved or exported model, or hf-hub:USER/MODEL"
    )
    images = add_images(parser)
    images.add_argument(
        "--unlabelled",
        action="store_true",
        help="the class folders mean nothing: use the images alone",
    )
    goal = parser.add_argument_group("goal (one of them)").add_mutually_exclusive_group(
        required=True
    )
    for name, unit, about in (
        ("--max-drop", "POINTS", "of accuracy, that may be lost to the full model"),
        ("--min-agreement", "PERCENT", "of answers, that must be the full model's"),
        ("--budget-layers", "LAYERS", "the mean exit layer"),
        ("--budget-ms", "MS", "milliseconds an image, as measured now on this machine"),
    ):
        goal.add_argument(name, type=float, metavar=unit, help=about)
    choice = parser.add_argument_group("choice")
    choice.add_argument(
        "--confidence", type=float, default=95.0, metavar="PERCENT", help="default: 95"
    )
    choice.add_argument(
        "--kind",
        default="confidence",
        help="confidence, entropy, patience, patient_confident or learned (default: confidence)",
    )
    choice.add_argument("--seed", type=int, default=0, help="of the halves (default: 0)")
    choice.add_argument(
        "--output", metavar="FOLDER", help="write the model there instead, with its weights"
    )
    choice.add_argument("--dry-run", action="store_true", help="write nothing")
    add_compute(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate, print in words, and save."""
    from lgvit_fast.checkpoints.files import save_json
    from lgvit_fast.checkpoints.fingerprint import fingerprint
    from lgvit_fast.data.batches import Batches, Loader
    from lgvit_fast.evaluation import calibrate, record
    from lgvit_fast.inference.planner import measure_costs

    if args.model.startswith(ON_THE_HUB) and not args.output and not args.dry_run:
        raise UsageError(f"{args.model} is on the hub: give --output FOLDER, or --dry-run")
    if args.unlabelled and args.max_drop is not None:
        raise UsageError("--max-drop needs classes; --unlabelled goes with --min-agreement")
    exported = is_exported(args.model)
    if exported and (args.output or args.budget_ms is not None):
        raise UsageError(f"{args.model} is exported: --output and --budget-ms need a saved model")
    model: Any
    if exported:
        from lgvit_fast.evaluation.exported import ExportedModel

        model = ExportedModel(load_exported(args))
    else:
        model = load_model(args.model, args.device)
    source, relabel = open_images(args, model)
    loader = Loader(source, Batches(len(source), args.batch_size, training=False), args.workers)
    batches = show_progress(loader.epoch(), len(loader))
    if relabel is not None and not args.unlabelled:
        batches = (batch._replace(targets=relabel(batch.targets)) for batch in batches)
    recording = record(model, batches, autocast_of(args, model), labelled=not args.unlabelled)
    found = calibrate(
        recording,
        **{name: getattr(args, name) for name in _GOALS},
        costs=None if args.budget_ms is None else measure_costs(model, args.batch_size),
        confidence=args.confidence / 100,
        kind=args.kind,
        seed=args.seed,
        weights=model.weights if exported else fingerprint(model.state_dict()),
    )
    print(f"\n{found.policy}\n\n{found.certificate}\n")
    print(f"On the {found.certificate.images} held-out images, with 95 % intervals:")
    print(found.expected)
    model.policy, model.certificate = found.policy, found.certificate
    if args.dry_run:
        print("\nNothing was written.")
    elif args.output:
        model.save_pretrained(args.output)
        print(f"\nThe model with this policy and certificate is in {args.output}.")
    else:
        if exported:
            model.save_pretrained(args.model)
        else:
            save_json(Path(args.model) / "config.json", model.get_config())
        print(f"\nPolicy and certificate are in {args.model}.")
    for image in recording.bad:
        print(f"lgvit-fast calibrate: cannot read {image.name}: {image.reason}", file=sys.stderr)
    return 1 if recording.bad else 0
