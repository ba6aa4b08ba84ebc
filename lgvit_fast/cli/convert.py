"""`lgvit-fast convert`: other checkpoints to saved models, and ours to the published code's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgvit_fast.arguments import UsageError, pair
from lgvit_fast.cli.options import load_model

if TYPE_CHECKING:
    from lgvit_fast.model import LGViT

ORIGINS = ("auto", "published", "huggingface", "torchvision", "timm")

_NOTES = """\
A checkpoint of the published code (ViT, DeiT or Swin, any head type, stage 1 or 2) keeps its exits. The
weights of a Hugging Face, torchvision or timm classifier get exits that are still untrained. Pickled
files are read as plain tensors: no code in them runs.

examples:
  lgvit-fast convert saved_models/ViT-base/cifar100/LGViT/ model/
  lgvit-fast convert pytorch_model.bin model/ --config config.json
  lgvit-fast convert google-vit-base/ model/ --from huggingface --heads linear
  lgvit-fast convert vit_small_patch16_224 model/ --from timm
  lgvit-fast convert output/train/model_best.pth.tar model/
  lgvit-fast convert weights.safetensors model/ --from timm --model vit_small_patch16_224
  lgvit-fast convert model/ for-the-published-code/ --to published
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument(
        "source",
        help="a .bin, .pth or .safetensors file, a folder holding one, or the name of a timm model",
    )
    parser.add_argument("output", help="folder to write config.json and model.safetensors to")
    parser.add_argument(
        "--from",
        dest="origin",
        choices=ORIGINS,
        default="auto",
        help="where the checkpoint comes from; default: as its names tell",
    )
    parser.add_argument(
        "--to",
        choices=("lgvit_fast", "published"),
        default="lgvit_fast",
        help="what to write; published takes a model saved by this package",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="default: config.json beside the weights, if there is one"
    )
    parser.add_argument(
        "--heads",
        metavar="HEAD",
        help="heads of the exits of a model that has none (default: lgvit)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="timm's name of a state dict that does not say its own"
    )
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        type=pair,
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of that timm model (img_size, patch_size, ...)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert, and say what came out."""
    from lgvit_fast.checkpoints import export_published

    source, output = Path(args.source), Path(args.output)
    if output.resolve() in (source.resolve(), source.resolve().parent):
        raise UsageError(f"the output {args.output!r} is where the source is; name another folder")
    if args.to == "published":
        if args.origin != "auto" or args.heads or args.config or args.model or args.model_kwargs:
            raise UsageError(
                "--to published takes a saved model and none of --from, --heads, --config, --model"
            )
        model = load_model(args.source, "cpu")
        export_published(model, output)
    else:
        model = _load(args)
        model.save_pretrained(output)
    kind = type(model.backbone).__name__
    places = ", ".join(f"{spec.head} after block {spec.layer}" for spec in model.exits)
    print(f"{kind}, {model.num_blocks} blocks, {model.num_classes} classes; exits: {places}")
    print(f"written to {args.output}")
    return 0


def _load(args: argparse.Namespace) -> LGViT:
    from lgvit_fast.checkpoints import (
        from_huggingface,
        from_timm,
        from_torchvision,
        is_timm,
        load_published,
    )
    from lgvit_fast.checkpoints.foreign import read

    folder = Path(args.source)
    if folder.is_dir() and _is_ours(folder):
        raise UsageError(
            f"{args.source!r} is a saved model already; --to published converts it back"
        )
    options: dict[str, Any] = {"heads": args.heads} if args.heads else {}
    if args.origin == "timm" or (args.origin == "auto" and is_timm(args.source)):
        kwargs = dict(args.model_kwargs)
        return from_timm(args.source, args.model, model_kwargs=kwargs, **options)
    if args.model or args.model_kwargs:
        raise UsageError("--model and --model-kwargs belong to --from timm")
    tensors, settings = read(args.source, args.config)
    origin = _origin(tensors) if args.origin == "auto" else args.origin
    if origin == "published":
        if args.heads:
            raise UsageError("--heads: a published checkpoint has exits of its own")
        return load_published(tensors, settings)
    if origin == "huggingface":
        return from_huggingface(tensors, settings, **options)
    return from_torchvision(tensors, **options)


def _origin(tensors: dict[str, Any]) -> str:
    if any(".highway." in name for name in tensors):
        return "published"
    roots = {name.split(".")[0] for name in tensors}
    if roots & {"vit", "deit", "swin"}:
        return "huggingface"
    return "torchvision" if roots & {"conv_proj", "features"} else "published"


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return str(config.get("format", "")).startswith("lgvit_fast/")
