"""`lgvit-fast report`: one page that says whether early exits are worth it here."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from lgvit_fast.arguments import count, natural
from lgvit_fast.cli.eval import add_images, open_images, open_source
from lgvit_fast.cli.options import add_policy, load_model, policy_from
from lgvit_fast.text import printable

_NOTES = """\
Answers the same images in every way there is here: the full model, early exit, and each rival, on
PyTorch (eager, compiled, and lgvit_fast.Engine), ONNX Runtime and OpenVINO where they are installed, in
float32 and int8.
Each way has a process of its own, and they take turns against the clock. The page has the accuracies
with intervals, the times, and a verdict in plain words. Use images that took no part in training.

A rival is a folder of a saved model (ours or timm's), TIMM_NAME=FILE.safetensors, or a timm name with
pretrained weights. Its classes must be the model's.

examples:
  lgvit-fast report run/stage2/best --data photos/validation
  lgvit-fast report run/stage2/best --data photos/validation --batch 1 16 --out photos.html \\
      --rivals vit_small_patch16_224=small.safetensors runs/distilled
  lgvit-fast report run/stage2/best --data photos/validation --engines eager onnxruntime
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument("model", metavar="MODEL_FOLDER", help="a saved model, or hf-hub:USER/MODEL")
    images = add_images(parser)
    images.add_argument(
        "--images",
        type=natural,
        default=1000,
        metavar="N",
        help="at most so many, drawn at random; 0: all (default: 1000)",
    )
    add_policy(parser)
    compared = parser.add_argument_group("what is compared")
    compared.add_argument(
        "--rivals", nargs="+", default=[], metavar="NAME|FOLDER", help="what else one might use"
    )
    compared.add_argument(
        "--engines",
        nargs="+",
        default=["eager", "compiled", "engine", "onnxruntime", "openvino"],
        metavar="ENGINE",
        help="eager, compiled, engine, onnxruntime, openvino (default: all that run here)",
    )
    compared.add_argument(
        "--precisions",
        nargs="+",
        default=["float32", "int8"],
        metavar="PRECISION",
        help="float32, int8 (default: both)",
    )
    compared.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="percentage points of accuracy that may be lost (default: 1)",
    )
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--batch",
        type=count,
        nargs="+",
        default=[1, 32],
        metavar="N",
        help="batch sizes to time at (default: 1 32)",
    )
    timing.add_argument("--timing-images", type=count, default=64, metavar="N", help="default: 64")
    timing.add_argument("--rounds", type=count, default=5, metavar="N", help="default: 5")
    timing.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    page = parser.add_argument_group("page")
    page.add_argument("--out", default="report.html", metavar="FILE", help="default: report.html")
    page.add_argument("--name", help="of the model on the page (default: its folder's)")
    page.add_argument(
        "--note", action="append", default=[], metavar="TEXT", help="a sentence for the page"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the verdict, and write the page."""
    from lgvit_fast.checkpoints.files import save_text
    from lgvit_fast.evaluation.report import make_report, page

    out = Path(args.out)
    _require_writable(out)
    model = load_model(args.model, args.device)
    if (policy := policy_from(args, model)) is not None:
        model.policy = policy
    _, relabel = open_images(args, model)
    report = make_report(
        model,
        partial(open_source, args),
        name=args.name or Path(args.model).name,
        data=f"{args.dataset} {args.data}".strip(),
        notes=args.note,
        rivals=args.rivals,
        engines=args.engines,
        precisions=args.precisions,
        batch_sizes=args.batch,
        images=args.images or None,
        timing_images=args.timing_images,
        rounds=args.rounds,
        tolerance=args.tolerance,
        batch_size=args.batch_size,
        relabel=relabel,
        progress=lambda line: print(printable(line), file=sys.stderr),
    )
    save_text(out, page(report))
    for verdict in report.verdicts:
        print(f"\nBatch {verdict.batch_size}: {printable(verdict.headline)}")
        for sentence in verdict.sentences:
            print(printable(f"  {sentence}"))
    print(f"\nThe page is {out}")
    for image in report.recording.bad:
        line = f"lgvit-fast report: cannot read {image.name}: {image.reason}"
        print(printable(line), file=sys.stderr)
    return 1 if report.recording.bad else 0


def _require_writable(out: Path) -> None:
    """Before minutes of measuring: whether the page can be written there.

    Raises:
        IsADirectoryError: it is a folder.
        OSError: no file can be made beside it.
    """
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder, expected the name of a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error}") from error
