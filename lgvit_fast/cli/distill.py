"""`lgvit-fast distill`: exits for a trained classifier, from pictures without labels."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgvit_fast.arguments import UsageError, count, natural, pair
from lgvit_fast.cli.train import as_options, exits_argument

if TYPE_CHECKING:
    from lgvit_fast.training import Distilled

_NOTES = """\
The model's own answers are the teacher: no labels are read, sub-folders mean nothing, and the backbone
and its classifier stay as they are, bit for bit. A tenth of the images is held out to choose the best
epoch by the agreement of the exits with the full model. OUT is a saved model for every other command;
OUT/run holds the run, which --resume goes on from.

--cache keeps the backbone's tokens on disk while the run lasts, so that all epochs together run the
backbone once (twice, with mirror images) for every image. It fixes the crops.

examples:
  lgvit-fast distill vit_tiny_patch16_224 --data photos/ --output early
  lgvit-fast distill vit_tiny_patch16_224 --weights model.safetensors --data photos.tar --output early
  lgvit-fast distill my-classifier/ --data photos/ --output early --epochs 10 --cache 20G
  lgvit-fast distill my-classifier/ --data photos/ --output early --min-agreement 98 --val-fraction 0.3
"""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; those that are fields of a config are only there if given."""
    parser.epilog = _NOTES
    parser.set_defaults(given={})
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a saved model, hf-hub:USER/MODEL, a folder, checkpoint or name of a timm model",
    )
    _add(parser, "--data", required=True, metavar="PATH", help="folder at any depth, or tar")
    parser.add_argument("--output", required=True, metavar="OUT", help="folder for the result")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--weights", metavar="FILE", help="weights of the timm model that MODEL names"
    )
    _add(
        group,
        "--model-kwargs",
        nargs="+",
        type=pair,
        metavar="KEY=VALUE",
        help="further arguments of the timm model",
    )
    _add(
        group,
        "--exits",
        type=exits_argument,
        metavar="N[,N...]",
        help="how many, or after which blocks",
    )
    _add(group, "--heads", nargs="+", metavar="HEAD", help="one for each exit, or one for all")
    group = parser.add_argument_group("training")
    _add(group, "--epochs", type=count, metavar="N", help="default: 5")
    _add(group, "--lr", type=float, metavar="X", help="peak learning rate (default: 0.001)")
    _add(group, "--batch-size", type=count, metavar="N", help="default: 64")
    _add(
        group,
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        help="begin with a fit to the model's own logits (default), or with noise",
    )
    _add(
        group,
        "--cache",
        type=_bytes,
        metavar="BYTES",
        help="most bytes for tokens on disk, as in 500M or 20G (default: no cache)",
    )
    _add(group, "--cache-folder", metavar="FOLDER", help="keep the cache there, for other runs")
    _add(
        group,
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="random crops, flips and colours; with a cache mirror images alone (default: yes)",
    )
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    group = parser.add_argument_group("held-out images")
    _add(group, "--val-data", metavar="PATH", help="other images to validate on")
    _add(group, "--val-fraction", type=float, metavar="X", help="default: 0.1")
    _add(
        group,
        "--min-agreement",
        type=float,
        metavar="PERCENT",
        help="calibrate the policy on two thirds of the held-out images, so that so many answers are"
        " shown to be the full model's (default: the policy stays as it is)",
    )
    group = parser.add_argument_group("machine and logs")
    _add(group, "--workers", type=natural, metavar="N", help="loader processes (default: 2)")
    _add(group, "--seed", type=int, metavar="N", help="default: 0")
    _add(group, "--device", help="cpu, cuda, ...; default: a GPU if there is one")
    _add(group, "--precision", choices=("fp32", "bf16", "fp16"), help="default: fp32")
    _add(
        group,
        "--skip-bad-images",
        action=argparse.BooleanOptionalAction,
        help="leave out unreadable and too small images",
    )


def run(args: argparse.Namespace) -> int:
    """Distil, and say how well the exits agree and where the result is."""
    from lgvit_fast.training import DistillConfig, run_distillation
    from lgvit_fast.training.config import distillation_stage

    try:
        fields = dict(args.given)
        stage2 = {name: fields.pop(name) for name in ("epochs", "lr") if name in fields}
        if "model_kwargs" in fields:
            fields["model_kwargs"] = dict(fields["model_kwargs"])
        if args.weights is not None:
            fields["model"] = args.model
        config = DistillConfig(
            output=str(Path(args.output) / "run"),
            init=args.weights or args.model,
            resume=args.resume,
            stage2=distillation_stage(**stage2),
            **fields,
        )
    except ValueError as error:
        raise UsageError(_named(str(error))) from error
    try:
        done = run_distillation(config)
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(_named(str(error))) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the same command with --resume goes on from the last checkpoint"
        ) from None
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
        _show(done, args)
    return 0


def _show(done: Distilled, args: argparse.Namespace) -> None:
    from lgvit_fast.cli.tables import table

    print(f"\nAgreement with the full model on {done.images} held-out images, %")
    head = [f"block {spec.layer}" for spec in done.model.exits]
    print(table(["", *head], [["exit", *(f"{100 * share:.1f}" for share in done.agreement)]]))
    if done.calibration is not None:
        print(f"\n{done.calibration}")
    print(f"\nThe model is in {args.output}, with the policy {done.model.policy}. Next:")
    if done.calibration is None:
        print(
            f"  lgvit-fast calibrate {args.output} --data OTHER_IMAGES --unlabelled --min-agreement 98"
        )
    print(f"  lgvit-fast predict {args.output} IMAGES\n  lgvit-fast export {args.output} FOLDER")


class _Given(argparse.Action):
    """Collects fields of a config in one place, so that the config's own defaults hold for the rest."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        namespace.given = {**namespace.given, self.dest: values}


class _GivenSwitch(argparse.BooleanOptionalAction):
    """Likewise, for `--x` and `--no-x`."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        namespace.given = {**namespace.given, self.dest: not str(option).startswith("--no-")}


def _add(group: Any, option: str, **about: Any) -> None:
    switch = about.pop("action", None) is argparse.BooleanOptionalAction
    action = _GivenSwitch if switch else _Given
    group.add_argument(option, action=action, default=argparse.SUPPRESS, **about)


def _bytes(text: str) -> int:
    """A number of bytes, with k, M, G or T for powers of 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 500M or 20G")
    return round(float(found[1]) * _UNITS[found[2]])


def _named(message: str) -> str:
    """A message with the names of config fields as options."""
    from lgvit_fast.training import DistillConfig

    return as_options(re.sub(r"\binit\b", "MODEL", message), DistillConfig)
