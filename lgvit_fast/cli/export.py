"""`lgvit-fast export`: a saved model to a folder that runs without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lgvit_fast.arguments import UsageError
from lgvit_fast.cli.options import load_model

_NOTES = """\
The folder gets one ONNX graph for each segment of the model (the blocks up to an exit, and the exit)
and manifest.json. It runs on ONNX Runtime or OpenVINO, on machines without torch: with
lgvit_fast.deploy.Deployed, `lgvit-fast predict` and `eval`, or a loop of your own (docs/deploy.md).
Needs the packages onnx and onnxscript: pip install 'lgvit-fast[export]'.

With --format executorch it gets segments.pte instead, one program with a method for each segment, for
ExecuTorch on phones: pip install 'lgvit-fast[executorch]'.

int8 stores weights in 8 bits, a quarter of the size, and is faster on OpenVINO where the processor has
VNNI instructions. Images without labels, at least 100, show what it changes: thresholds are fitted to
its scores, and if fewer than 97 % of the images keep their class at full depth, or no time is gained
here, it is refused with the figures.

examples:
  lgvit-fast export run/stage2/best exported/
  lgvit-fast export run/stage2/best exported/ --precision int8 --calibration photos/calibration
  lgvit-fast predict exported/ cat.jpg dog.png
  lgvit-fast export run/stage2/best phone/ --format executorch
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument("model", metavar="MODEL_FOLDER", help="a saved model, or hf-hub:USER/MODEL")
    parser.add_argument("folder", metavar="FOLDER", help="where to; an export there is replaced")
    parser.add_argument(
        "--precision", choices=("float32", "int8"), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        help="images for int8: folder or tar of class folders (their names are not used)",
    )
    parser.add_argument("--force", action="store_true", help="export int8 even where it is refused")
    parser.add_argument(
        "--format", choices=("onnx", "executorch"), default="onnx", help="default: onnx"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and say what came out."""
    if Path(args.folder).resolve() == Path(args.model).resolve():
        raise UsageError(f"the folder {args.folder!r} is where the model is; name another")
    if args.precision == "int8" and args.calibration is None:
        raise UsageError("--precision int8 needs --calibration DIR: images like those to come")
    if args.precision != "int8" and (args.calibration or args.force):
        raise UsageError("--calibration and --force go with --precision int8")
    model = load_model(args.model, "cpu")

    import lgvit_fast
    from lgvit_fast.deploy.manifest import Manifest

    options = {"calibration": args.calibration, "force": args.force}
    folder = lgvit_fast.export(
        model, args.folder, precision=args.precision, format=args.format, **options
    )
    manifest = Manifest.load(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    policy = manifest.policy or model.policy
    print(f"{len(model.exits) + 1} graphs, {size:.1f} MB, {args.precision}; exits under {policy}")
    if manifest.int8:
        _show(manifest.int8, args.folder)
    print(f"written to {args.folder}")
    return 0


def _show(int8: dict[str, Any], folder: str) -> None:
    """Print what was measured of int8."""
    percents = " ".join(f"{percent:.1f}" for percent in int8["agreement"])
    print(
        f"percent of {int8['images']} images that keep their class, by exit and at the end: {percents}"
    )
    for precision, runtimes in int8["milliseconds"].items():
        for runtime, times in runtimes.items():
            told = ", ".join(f"{ms:.2f} in batches of {size}" for size, ms in times.items())
            print(f"{precision} on {runtime}, milliseconds an image: {told}")
    print(f"thresholds: {int8['policy']}; certificate: {int8['certificate']}")
    if int8["certificate"] != "none":
        print(f"a certificate of int8: lgvit-fast calibrate {folder} --data IMAGES")
