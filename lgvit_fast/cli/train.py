"""`lgvit-fast train`: every field of `TrainConfig` as an option."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import types
import typing
from typing import Any

from lgvit_fast.arguments import UsageError, pair
from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig, TrainResult
from lgvit_fast.training.config import StageConfig

_NOTES = """\
Stage 1 trains backbone and heads together; stage 2 freezes the backbone and teaches the heads with it.
OUTPUT/stage1/best and OUTPUT/stage2/best are saved models; beside them are the checkpoint that --resume
goes on from, metrics.jsonl and TensorBoard logs.

examples:
  lgvit-fast train --data photos/ --model vit_small_patch16_224 --pretrained --output run
  lgvit-fast train --data cifar10/train.tar --val-data cifar10/test.tar --model vit_tiny_patch16_224 \\
      --model-kwargs img_size=32 patch_size=4 --stage1.epochs 20 --stage2.epochs 5 --output run
  lgvit-fast train --init run/stage2/best --data more-photos/ --output more       (go on from a model)
  lgvit-fast train --dataset torch/cifar100 --data ~/data --download --num-classes 100 --output run
  lgvit-fast train --config run/config.json --resume                  (after an interruption)
  lgvit-fast train --stage 2 --stage1-from run/stage1/best --data photos/ --output again
"""

# What the text of an option is, where it is no name.
_WHAT = {
    "output": "FOLDER",
    "stage1_from": "PATH",
    "init": "SOURCE",
    "data": "PATH",
    "val_data": "PATH",
    "device": "DEVICE",
}

_GROUPS = {
    "output": "run",
    "init": "model",
    "data": "images",
    "augment": "augmentation",
    "device": "machine and logs",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field; only those given land in the arguments."""
    parser.epilog = _NOTES
    parser.add_argument(
        "--config", metavar="FILE", help="take every other value from a run's config.json"
    )
    group: Any = parser
    for field in dataclasses.fields(TrainConfig):
        if field.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[field.name])
        if field.name not in ("stage1", "stage2"):
            _add(group, TrainConfig, field, "")
    for stage, of in (("stage1", Stage1Config), ("stage2", Stage2Config)):
        group = parser.add_argument_group(f"stage {stage[-1]}")
        for field in dataclasses.fields(of):
            _add(group, of, field, f"{stage}.")


def run(args: argparse.Namespace) -> int:
    """Train, and say where the result is."""
    from lgvit_fast.training import train

    config = _config(args)
    try:
        result = train(config)
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(as_options(str(error))) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the same command with --resume goes on from the last checkpoint"
        ) from None
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
        _show(result, config)
    return 0


def _show(result: TrainResult, config: TrainConfig) -> None:
    """How good each stage's best model is, where it lies, and what comes next."""
    from lgvit_fast.cli.tables import table

    layers = [f"block {spec.layer}" for spec in result.model.exits]
    rows = [
        [name, *(f"{100 * accuracy:.1f}" for accuracy in (*s.accuracy.exits, s.accuracy.final))]
        for name, s in result.stages.items()
    ]
    print("\nAccuracy of every classifier on all validation images, %")
    print(table(["best of", *layers, "final"], rows))
    skipped = sum(stage.bad_images for stage in result.stages.values())
    if skipped:
        print(f"left out unreadable images {skipped} times")
    best = list(result.stages.values())[-1].best
    print(f"\nThe model is in {best}. Next:\n  lgvit-fast eval {best} {_to_evaluate(config)}")


def _to_evaluate(config: TrainConfig) -> str:
    """Options of `eval` for images that were not trained on."""
    from lgvit_fast.training.datasets import validation_folder

    if config.val_data is not None:
        return f"--data {config.val_data}"
    if config.dataset:
        return f"--data {config.data} --dataset {config.dataset} --split {config.val_split}"
    folder = validation_folder(config)
    if folder is not None:
        return f"--data {folder}"
    if config.data == "digits":
        return "--data digits"
    return (
        "--data FOLDER\nwith a folder of other images: those of the training folder were trained on"
    )


def _config(args: argparse.Namespace) -> TrainConfig:
    """The config from --config, with what was given besides.

    Raises:
        UsageError: a value that makes no sense.
    """
    values: dict[str, Any] = {}
    if args.config is not None:
        values = TrainConfig.load(args.config).to_dict()
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    for name, value in vars(args).items():
        stage, _, inner = name.rpartition(".")
        if stage:
            values.setdefault(stage, {})[inner] = value
        elif name in known:
            values[name] = dict(value) if name == "model_kwargs" else value
    try:
        return TrainConfig.from_dict(values)
    except ValueError as error:
        raise UsageError(as_options(str(error))) from error


def as_options(message: str, of: type[TrainConfig] = TrainConfig) -> str:
    """A message with the names of config fields written as the options that they are here.

    Fields of one word are common words, too: of these only `name=True` and a leading `name is` change.
    """
    for field in dataclasses.fields(of):
        option = "--" + field.name.replace("_", "-")
        message = re.sub(rf"\b{field.name}=True\b", option, message)
        found = rf"\b{field.name}\b" if "_" in field.name else rf"^{field.name}(?= is )"
        message = re.sub(found, option, message)
    return message


def _add(group: Any, of: type[TrainConfig | StageConfig], field: Any, prefix: str) -> None:
    """Add a dataclass field as an option, its help from the class's docstring."""
    kind = typing.get_type_hints(of)[field.name]
    options: dict[str, Any] = {
        "dest": prefix + field.name,
        "default": argparse.SUPPRESS,
        "help": _help(of, field),
    }
    allowed = [part for part in _parts(kind) if part is not type(None)]
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif field.name == "model_kwargs":
        options.update(nargs="+", type=pair, metavar="KEY=VALUE")
    elif field.name == "exits":
        options.update(type=exits_argument, metavar="N[,N...]")
    elif typing.get_origin(kind) is tuple:
        options.update(nargs=2, type=float, metavar=("LOW", "HIGH"))
    elif list[str] in allowed:
        options.update(nargs="+", type=str, metavar="HEAD")
    elif typing.get_origin(kind) is typing.Literal:
        options["choices"] = typing.get_args(kind)
    elif allowed[0] is str:
        options.update(type=str, metavar=_WHAT.get(field.name, "NAME"))
    else:
        options.update(type=allowed[0], metavar="N" if allowed[0] is int else "X")
    group.add_argument(f"--{prefix}{field.name.replace('_', '-')}", **options)


def _parts(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _help(of: type, field: Any) -> str:
    """What the docstrings say of a field, and its default."""
    for base in of.__mro__:
        found = re.search(
            rf"^ {{8}}{field.name}: (.+?)(?=^ {{8}}\S|^ {{4}}\S|^\s*$|\Z)",
            base.__doc__ or "",
            re.MULTILINE | re.DOTALL,
        )
        if found:
            break
    else:
        raise LookupError(f"{of.__name__} does not document {field.name}")
    text = " ".join(found[1].split()).replace("`", "").rstrip(".")
    if field.default not in (None, "", dataclasses.MISSING):
        text += f" (default: {field.default})"
    return text.replace("%", "%%")


def exits_argument(text: str) -> int | list[int]:
    """How many exits, or their blocks."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a count nor blocks with commas between them"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
