"""`lgvit-fast eval`: accuracy, exits and speed of a saved model, and the threshold to use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgvit_fast.arguments import UsageError, count, natural, not_negative
from lgvit_fast.cli.options import (
    MODEL_HELP,
    ON_THE_HUB,
    POLICIES,
    add_compute,
    add_policy,
    autocast_of,
    is_exported,
    load_exported,
    load_model,
    policy_from,
)
from lgvit_fast.runtimes.loaders import RUNTIMES
from lgvit_fast.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from lgvit_fast.data.batches import Source
    from lgvit_fast.data.transforms import InputSpec
    from lgvit_fast.evaluation import Evaluation
    from lgvit_fast.model import LGViT
    from lgvit_fast.policies import Policy

_NOTES = """\
One pass keeps what every exit says of every image; each policy is then replayed on that. Without
--threshold (or --patience) the one with the largest layer ratio is chosen that loses at most
--tolerance points of accuracy on one half of the images (--seed says which); everything is reported on
the other half, with 95 % intervals. `lgvit-fast calibrate` chooses with a guarantee.

Two speeds are reported. The layer ratio is L / mean exit layer: what the method could gain if heads and
bookkeeping cost nothing. The wall clock is measured against the same backbone run to the end without
heads, both warm, in alternating rounds on images drawn at random; median and quartiles of the rounds.

OUT holds report.json, tradeoff.png and exits.png. Exit code 1 if a file could not be read.

examples:
  lgvit-fast eval run/stage2/best --data photos/validation
  lgvit-fast eval run/stage2/best --data photos.tar --policy all --tolerance 0.5 --save-policy
  lgvit-fast eval run/stage2/best --dataset torch/cifar10 --data ~/data --split validation
  lgvit-fast eval run/stage2/best --data photos --policy confidence --threshold 0.8 --timing-batch 1 32
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument("model", metavar="MODEL_FOLDER", help=MODEL_HELP)
    add_images(parser)
    add_policy(
        parser,
        (*POLICIES, "all", "saved"),
        "what to sweep and choose from; saved: report the model's own (default: confidence)",
    )
    choice = parser.add_argument_group("choice and report")
    choice.add_argument(
        "--tolerance",
        type=not_negative,
        default=1.0,
        metavar="POINTS",
        help="percentage points of accuracy that early exit may cost (default: 1)",
    )
    choice.add_argument(
        "--seed", type=int, default=0, help="of the halves to choose and report on (default: 0)"
    )
    choice.add_argument(
        "--save-policy", action="store_true", help="save the reported policy with the model"
    )
    choice.add_argument(
        "--out", default="eval-output", metavar="FOLDER", help="default: eval-output"
    )
    choice.add_argument(
        "--save-recording",
        type=Path,
        metavar="FILE",
        help="write what every exit says of every image (safetensors, for Recording.load)",
    )
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--timing-batch",
        type=count,
        nargs="+",
        default=[32],
        metavar="N",
        help="batch sizes to time at (default: 32)",
    )
    timing.add_argument(
        "--timing-images", type=count, default=256, metavar="N", help="default: 256"
    )
    timing.add_argument(
        "--timing-rounds", type=count, default=9, metavar="N", help="of each side (default: 9)"
    )
    timing.add_argument(
        "--runtime",
        default="torch",
        choices=("torch", *RUNTIMES, "auto"),
        help="of the full model and early exit; auto takes the fastest installed (default: torch)",
    )
    timing.add_argument(
        "--plan", action="store_true", help="ask only the exits that pay at each batch size"
    )
    timing.add_argument("--no-timing", action="store_true", help="accuracy and layers only")
    add_compute(parser)


def add_images(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add --data and what goes with it."""
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="folder or tar of class folders, root of a named dataset, or `digits` (bundled)",
    )
    data.add_argument(
        "--dataset", default="", metavar="NAME", help="a timm dataset: torch/cifar10, hfds/..., ..."
    )
    data.add_argument(
        "--split",
        default="validation",
        help="of a named dataset, or sub-folder of PATH (default: validation)",
    )
    data.add_argument("--download", action="store_true", help="let a named dataset fetch itself")
    data.add_argument("--batch-size", type=count, default=64, metavar="N", help="default: 64")
    data.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="loader processes (default: 0)"
    )
    return data


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, and write the report."""
    from lgvit_fast.evaluation import evaluate

    if args.save_policy and args.model.startswith(ON_THE_HUB):
        raise UsageError(f"--save-policy writes to a folder; {args.model} is on the hub")
    model = _exported(args) if is_exported(args.model) else load_model(args.model, args.device)
    kinds, policy = _policies(args, model)
    source, relabel = open_images(args, model)
    evaluation = evaluate(
        model,
        source,
        kinds=kinds,
        policy=policy,
        tolerance=args.tolerance,
        batch_size=args.batch_size,
        workers=args.workers,
        timing_batches=() if args.no_timing else args.timing_batch,
        timing_images=args.timing_images,
        timing_rounds=args.timing_rounds,
        runtime=args.runtime,
        plan=args.plan,
        autocast=autocast_of(args, model),
        relabel=relabel,
        seed=args.seed,
        progress=show_progress,
    )
    show(evaluation, model)
    data = f"{args.dataset} {args.data}".strip()
    write(evaluation, model, Path(args.out), {"model": args.model, "data": data})
    print(f"\nreport.json, tradeoff.png and exits.png are in {args.out}")
    if args.save_recording is not None:
        evaluation.everything.save(args.save_recording)
        print(f"{len(evaluation.everything)} images are recorded in {args.save_recording}")
    if args.save_policy:
        model.policy = evaluation.chosen.policy
        model.save_pretrained(args.model)
        print(f"{model.policy} is now the policy of {args.model}")
    for image in evaluation.recording.bad:
        line = f"lgvit-fast eval: cannot read {image.name}: {image.reason}"
        print(printable(line), file=sys.stderr)
    return 1 if evaluation.recording.bad else 0


def _exported(args: argparse.Namespace) -> Any:
    from lgvit_fast.evaluation.exported import ExportedModel

    return ExportedModel(load_exported(args))


def show(evaluation: Evaluation, model: LGViT) -> None:
    """Print an evaluation."""
    from lgvit_fast.cli.tables import exit_table, gain, timing_table, tradeoff_table

    chosen_on = ""
    if evaluation.selection_images:
        chosen_on = f"; the policy was chosen on {evaluation.selection_images} others"
    print(f"\n{len(evaluation.recording)} images{chosen_on}\n\nTrade-off")
    print(tradeoff_table(evaluation))
    if not evaluation.within:
        print(f"  (no more than {evaluation.tolerance:g} points lost: not reached)")
    print(f"\nExits under {evaluation.chosen.policy}")
    print(exit_table(evaluation, model))
    if evaluation.timings:
        print("\nWall clock, median and quartiles")
        print(timing_table(evaluation.timings))
    print(f"\n{gain(evaluation)}")


def write(evaluation: Evaluation, model: LGViT, folder: Path, facts: dict[str, Any]) -> None:
    """Write report.json, tradeoff.png and exits.png."""
    from lgvit_fast.checkpoints.files import save_json
    from lgvit_fast.data.transforms import InputSpec
    from lgvit_fast.evaluation.plots import plot_exits, plot_tradeoff

    save_json(folder / "report.json", {**facts, **evaluation.to_dict()})
    plot_tradeoff(evaluation, folder / "tradeoff.png", "Accuracy against depth")
    spec = InputSpec.of(model.backbone)
    plot_exits(evaluation, folder / "exits.png", spec, model.class_names)


def show_progress(batches: Iterable[Any], total: int) -> Iterable[Any]:
    """A progress bar over batches, if standard error is a terminal."""
    from tqdm import tqdm

    # disable=None: only on a terminal, a file would get a line for every step
    bar: Iterable[Any] = tqdm(batches, total=total, desc="evaluate", unit="batch", disable=None)
    return bar


def _policies(args: argparse.Namespace, model: LGViT) -> tuple[Sequence[str], Policy | None]:
    """The kinds to sweep, and the policy to report if it is not to be chosen."""
    from lgvit_fast.evaluation.tradeoff import KINDS

    given = args.threshold is not None or args.patience is not None
    if args.policy not in ("all", "saved"):
        kind = args.policy or _implied(args)
        return (kind,), policy_from(args, model, default=kind) if given else None
    if given:
        raise UsageError(f"--policy {args.policy} takes no --threshold and no --patience")
    if args.policy == "all":
        return POLICIES, None
    return [name for name, kind in KINDS.items() if type(model.policy) is kind], model.policy


def _implied(args: argparse.Namespace) -> str:
    """The kind of policy that takes the numbers given."""
    if args.patience is None:
        return "confidence"
    return "patience" if args.threshold is None else "patient_confident"


def open_images(
    args: argparse.Namespace, model: LGViT
) -> tuple[Source, Callable[[Tensor], Tensor] | None]:
    """The images, and what brings their class numbers to the model's."""
    from lgvit_fast.data.classes import match_classes
    from lgvit_fast.data.transforms import InputSpec

    source = open_source(args, InputSpec.of(model.backbone))
    places = match_classes(source.class_names, model.class_names, args.data)
    return source, None if places is None else lambda targets: places[targets]


def open_source(args: argparse.Namespace, spec: InputSpec) -> Source:
    """The images that the arguments name, as a model wants them."""
    from lgvit_fast.data.digits import Digits
    from lgvit_fast.data.sources import ImageSource, open_dataset
    from lgvit_fast.data.transforms import eval_transform

    if args.data == "digits" and not args.dataset:
        return Digits("validation", spec)
    dataset = open_dataset(args.data, args.dataset, args.split, args.download)
    mode = "L" if spec.channels == 1 else "RGB"
    return ImageSource(dataset, eval_transform(spec), mode)
