"""`lgvit-fast export`: a saved model to a folder that runs without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from lgvit_fast.arguments import UsageError
from lgvit_fast.cli.options import load_model

_NOTES = """\
The folder gets one ONNX graph for each segment of the model (the blocks up to an exit, and the exit)
and manifest.json. It runs on ONNX Runtime or OpenVINO, on machines without torch: with
lgvit_fast.deploy.Deployed, `lgvit-fast predict` and `eval`, or a loop of your own (docs/deploy.md).
Needs the packages onnx and onnxscript: pip install 'lgvit-fast[export]'.

With --format executorch it gets segments.pte instead, one program with a method for each segment, for
ExecuTorch on phones: pip install 'lgvit-fast[executorch]'.

examples:
  lgvit-fast export run/stage2/best exported/
  lgvit-fast predict exported/ cat.jpg dog.png
  lgvit-fast export run/stage2/best phone/ --format executorch
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument("model", metavar="MODEL_FOLDER", help="a saved model, or hf-hub:USER/MODEL")
    parser.add_argument("folder", metavar="FOLDER", help="where to; an export there is replaced")
    parser.add_argument(
        "--precision", choices=("float32",), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--format", choices=("onnx", "executorch"), default="onnx", help="default: onnx"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and say what came out."""
    if Path(args.folder).resolve() == Path(args.model).resolve():
        raise UsageError(f"the folder {args.folder!r} is where the model is; name another")
    model = load_model(args.model, "cpu")

    import lgvit_fast

    folder = lgvit_fast.export(model, args.folder, precision=args.precision, format=args.format)
    files = sorted(folder.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    print(
        f"{len(model.exits) + 1} graphs, {size:.1f} MB, {args.precision}; exits under {model.policy}"
    )
    print(f"written to {args.folder}")
    return 0
