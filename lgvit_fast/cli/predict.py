"""`lgvit-fast predict`: image files to answers, one line each."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lgvit_fast.arguments import UsageError, count, natural
from lgvit_fast.cli.options import (
    MODEL_HELP,
    add_compute,
    add_policy,
    autocast_of,
    is_exported,
    load_exported,
    load_model,
    policy_from,
)
from lgvit_fast.text import csv_field, json_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from lgvit_fast.data.batches import Batch
    from lgvit_fast.deploy import Answers, Deployed
    from lgvit_fast.inference import Engine
    from lgvit_fast.model import LGViT
    from lgvit_fast.outputs import Inference

_COLUMNS = (
    "path",
    "label",
    "class_index",
    "confidence",
    "exit_layer",
    "milliseconds",
    "error",
)

_NOTES = """\
Each image gives one line, in the order given:
  label          the class's name, or its number where the model has no names
  class_index    the class's number
  confidence     softmax probability of that class, at the exit where the image left
  exit_layer     the transformer block after which it left, counted from 1
  others         with --topk K: the K - 1 classes that come next, each with these three; in CSV columns
                 label_2, class_index_2, confidence_2, ...
  milliseconds   its share of the time its batch took in the model (files are read before that)
A file that cannot be read, or is none (a FIFO, a device), gives a line with "error"; the others are
answered all the same, and the exit code is 1. JSON lines are ASCII; in CSV, control characters and
backslashes in names are escaped as in Python.

examples:
  lgvit-fast predict run/stage2/best cat.jpg dog.png
  lgvit-fast predict run/stage2/best photos/ --format csv > answers.csv
  find photos -name '*.jpg' | lgvit-fast predict run/stage2/best - --policy confidence --threshold 0.8
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument("model", metavar="MODEL_FOLDER", help=MODEL_HELP)
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="image files, folders (searched for images, at any depth), or - for a list of paths on"
        " standard input, one a line",
    )
    parser.add_argument(
        "--format", choices=("jsonl", "csv"), default="jsonl", help="default: jsonl"
    )
    parser.add_argument(
        "--csv-safe",
        action="store_true",
        help="in CSV, put an apostrophe before text that a spreadsheet would run: = + - @ in front",
    )
    parser.add_argument(
        "--class-map", metavar="FILE", help="class names, one a line, in their order"
    )
    parser.add_argument(
        "--topk", type=count, default=1, metavar="K", help="the K likeliest classes (default: 1)"
    )
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--workers",
        type=natural,
        default=0,
        metavar="N",
        help="processes that read files (default: 0)",
    )
    add_policy(parser)
    add_compute(parser)


def run(args: argparse.Namespace) -> int:
    """Answer every image; 1 if any could not be read."""
    exported = is_exported(args.model)
    model = load_exported(args) if exported else load_model(args.model, args.device)
    policy = policy_from(args, model)
    if policy is not None:
        model.policy = policy
    names = _class_names(args.class_map, model)
    if args.topk > model.num_classes:
        raise UsageError(f"--topk {args.topk}: the model has {model.num_classes} classes")
    certified = f"; {model.certificate}" if model.certificate else ""
    print(f"lgvit-fast predict: exits by {model.policy}{certified}", file=sys.stderr)
    write = _writer(args.format, args.topk, args.csv_safe)
    failed = 0
    rows: Any = _exported_rows if exported else _rows
    for row in rows(model, list(_files(args.paths)), names, args):
        failed += "error" in row
        write(row)
    if failed:
        files = "1 file" if failed == 1 else f"{failed} files"
        print(f"lgvit-fast predict: {files} could not be answered", file=sys.stderr)
    return 1 if failed else 0


def _rows(
    model: LGViT, paths: list[str], names: list[str], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row per path, in order."""
    from lgvit_fast.data.batches import Batches, Loader
    from lgvit_fast.data.sources import ImageSource
    from lgvit_fast.data.transforms import InputSpec, eval_transform
    from lgvit_fast.inference import Engine

    if not paths:
        return
    spec = InputSpec.of(model.backbone)
    mode = "L" if spec.channels == 1 else "RGB"
    source = ImageSource(_Files(paths), eval_transform(spec), mode)
    engine = Engine(model, max_batch=args.batch_size)
    batches = Batches(len(paths), args.batch_size, training=False)
    start = 0
    for batch in Loader(source, batches, args.workers).epoch():
        stop = min(start + args.batch_size, len(paths))
        found = _answer(engine, batch, names, args) if len(batch.targets) else []
        answers = iter(found)
        bad = iter(batch.bad)
        read = set(batch.targets.tolist())
        for position in range(start, stop):
            row = next(answers) if position in read else {"error": next(bad).reason}
            yield {"path": paths[position], **row}
        start = stop


def _exported_rows(
    model: Deployed, paths: list[str], names: list[str], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """`_rows` where torch need not be installed."""
    import numpy as np

    for start in range(0, len(paths), args.batch_size):
        part = paths[start : start + args.batch_size]
        images, errors = [], {}
        for path in part:
            try:
                images.append(model.manifest.preprocessing.read(path))
            except Exception as error:  # whatever a decoder raises is a bad image
                errors[path] = f"{type(error).__name__}: {error}"
        rows: list[dict[str, Any]] = []
        if images:
            batch = np.stack(images)
            if not start:
                model(batch[:1])  # the runtime's first run allocates; not the images' time
            began = time.perf_counter()
            result = model(batch)
            milliseconds = 1000 * (time.perf_counter() - began) / len(batch)
            rows = _described(result, milliseconds, names, args.topk)
        answers = iter(rows)
        for path in part:
            row = {"error": errors[path]} if path in errors else next(answers)
            yield {"path": path, **row}


def _answer(
    engine: Engine, batch: Batch, names: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    from contextlib import nullcontext

    import torch

    from lgvit_fast.clock import synchronize

    device = next(engine.model.parameters()).device
    images = batch.images.to(device)
    with torch.inference_mode(), autocast_of(args, engine.model) or nullcontext():
        if not engine.report().segments[0].runs:
            engine(images[:1])  # prepares weights and chooses kernels; not the images' time
        synchronize(device)
        began = time.perf_counter()
        result = engine(images)
        synchronize(device)
    milliseconds = 1000 * (time.perf_counter() - began) / len(images)
    return _described(result, milliseconds, names, args.topk)


def _described(
    result: Inference | Answers, milliseconds: float, names: Sequence[str], topk: int
) -> list[dict[str, Any]]:
    """What is said of each image of a batch."""
    rows: list[dict[str, Any]] = []
    likeliest = result.topk(topk)
    for numbers, confidences, layer, nonfinite in zip(
        likeliest.classes.tolist(),
        likeliest.probabilities.tolist(),
        result.exit_layer.tolist(),
        result.nonfinite.tolist(),
        strict=True,
    ):
        if nonfinite:
            rows.append({"error": "the model's logits are not finite for this image"})
            continue
        answers: list[dict[str, Any]] = [
            {
                "label": names[number] if names else str(number),
                "class_index": number,
                "confidence": round(confidence, 6),
            }
            for number, confidence in zip(numbers, confidences, strict=True)
        ]
        best, *others = answers
        work: dict[str, Any] = {"exit_layer": layer, "milliseconds": round(milliseconds, 3)}
        rows.append({**best, **({"others": others} if others else {}), **work})
    return rows


class _Files:
    """Paths as a data set of (image, place in the list), the way `ImageSource` reads one."""

    def __init__(self, paths: list[str]) -> None:
        self.samples = [(path, place) for place, path in enumerate(paths)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Image, int]:
        from lgvit_fast.data.images import open_image

        return open_image(self.samples[place][0]), place


def _files(paths: list[str]) -> Iterator[str]:
    """The files that the arguments name; what does not exist stays in, to be reported."""
    from lgvit_fast.data.suffixes import image_files

    for path in paths:
        if path == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(path):
            yield from image_files(path)
        else:
            yield path


def _class_names(path: str | None, model: LGViT | Deployed) -> list[str]:
    if path is None:
        return list(model.class_names or ())
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        names = [line.strip() for line in file if line.strip()]
    if len(names) != model.num_classes:
        raise UsageError(f"{path} names {len(names)} classes, the model has {model.num_classes}")
    return names


def _writer(form: str, topk: int, no_formula: bool) -> Any:
    """A function that prints a row."""
    if form == "jsonl":
        return lambda row: print(json_line(row), flush=True)
    more = [f"{name}_{place}" for place in range(2, topk + 1) for name in _COLUMNS[1:4]]
    writer = csv.DictWriter(sys.stdout, [*_COLUMNS, *more], lineterminator="\n")
    writer.writeheader()

    def write(row: dict[str, Any]) -> None:
        row = _flat(row)
        texts = {key: csv_field(v, no_formula) for key, v in row.items() if isinstance(v, str)}
        writer.writerow({**row, **texts})

    return write


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the further classes in columns of their own."""
    flat = {name: value for name, value in row.items() if name != "others"}
    for place, other in enumerate(row.get("others", ()), start=2):
        flat.update({f"{name}_{place}": value for name, value in other.items()})
    return flat
