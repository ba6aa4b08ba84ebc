r"""Tables and a picture of what `benchmarks.recipes_real` recorded.

    python -m benchmarks.recipes_report --results benchmarks/results/recipes_real.json \
        --runs runs/recipes_real --time --figure docs/images/recipes_real.png

A policy's threshold is chosen on one half of a seed's test images, so that it costs what is wanted
there, and is reported on the other half; then the halves change places. Between two neighbouring
thresholds the accuracy is linear, as of a policy that uses either at random. Costs are blocks,
multiply-adds (the heads' in their inference form), or seconds of the engine's parts as measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import lgvit_fast
from benchmarks.recipes_real import LOCAL_LINEAR, MODEL, load_recording
from lgvit_fast.evaluation import Recording
from lgvit_fast.evaluation.families import family
from lgvit_fast.heads import ExitSpec
from lgvit_fast.inference import Costs, measure_costs
from lgvit_fast.training.recipes import RECIPES

RATIOS = (1.3, 1.5, 1.8, 2.0, 2.2)
KINDS = {
    "Confidence": "confidence",
    "Patience": "patience",
    "PatientConfident": "patient_confident",
}
STUDENT = {2: 4.30, 3: 3.18, 4: 2.78}  # 97.5 % quantile of Student's t
TITLES = {"cifar10": "CIFAR-10", "tiny_imagenet": "Tiny-ImageNet"}

# mean cost of an image, of a histogram (shares, E + 1) of where images leave
Cost = Callable[[np.ndarray], float]


# ------------------------------------------------------------------------------------- costs


def exit_multiply_adds(spec: ExitSpec, grid: int, width: int, classes: int) -> int:
    """Multiply-adds of one exit in its inference form (docs/architecture.md), of a ViT.

    Args:
        spec: the exit.
        grid: patches of a side.
        width: C.
        classes: K.
    """
    n, square = grid * grid, width * width
    if spec.family in (
        "lph_full",
        "lph_light",
    ):  # the means of v and x, and cls
        return (
            n * square + (9 * n * width if spec.family == "lph_full" else 0) + 3 * width * classes
        )
    if spec.family == "gah":  # q and k, their products, a row of weights a head, its values
        pooled = (-(-grid // spec.stride)) ** 2
        attended = 2 * pooled * square + pooled * pooled * width + 8 * pooled * width
        return attended + square + 2 * width * classes
    pooler = square + width * classes
    if spec.family == "linear":
        return pooler
    if spec.family == "vit_ee":
        return block_multiply_adds(n + 1, width) + pooler
    raise ValueError(f"head is {spec.head!r}, whose multiply-adds are not known here")


def block_multiply_adds(tokens: int, width: int) -> int:
    """Of a transformer block on so many tokens."""
    return 12 * tokens * width * width + 2 * tokens * tokens * width


def cumulative_multiply_adds(
    exits: Sequence[ExitSpec], grid: int, width: int, classes: int, blocks: int = 12
) -> tuple[list[int], int]:
    """Multiply-adds of an image that leaves at each exit and at the end, and of the dense model."""
    block = block_multiply_adds(grid * grid + 1, width)
    embed, final = grid * grid * 3 * 16 * 16 * width, width * classes
    heads = list(itertools.accumulate(exit_multiply_adds(e, grid, width, classes) for e in exits))
    until = [embed + spec.layer * block + head for spec, head in zip(exits, heads, strict=True)]
    dense = embed + blocks * block + final
    return [*until, dense + (heads[-1] if heads else 0)], dense


# ------------------------------------------------------------------------------------ curves


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Accuracy at a cost.

    Attributes:
        right: `[n]` share in [0, 1] of the answers to each image that are right.
        layer_ratio: L over the mean exit layer, on the images reported on.
        shares: `[E + 1]` of where they leave.
    """

    right: np.ndarray
    layer_ratio: float
    shares: np.ndarray


def halves(
    recording: Recording, kind: str, steps: Sequence[float], cost: Cost, dense: float
) -> Any:
    """For each ratio the `Outcome` with thresholds from the other half; None if out of reach."""
    first, second = recording.split(0)
    found: list[list[Any]] = []
    for selection, report in ((first, second), (second, first)):
        chosen = family(kind, selection)
        on_selection, on_report = chosen.scores(selection), chosen.scores(report)
        thresholds = [float("inf"), *on_selection.path(recording.layers)]
        exits = [on_report.exits(level) for level in thresholds]
        spent = [cost(_shares(on_selection.exits(t), recording)) for t in thresholds]
        found.append(
            [_between(spent, dense / r, exits, on_report.predictions, report) for r in steps]
        )
    return [_join(a, b) for a, b in zip(*found, strict=True)]


def _shares(exits: Tensor, recording: Recording) -> np.ndarray:
    counts = torch.bincount(exits, minlength=recording.num_exits + 1).double()
    return (counts / counts.sum()).numpy()


def _between(
    spent: list[float], target: float, exits: list[Tensor], predictions: Tensor, report: Recording
) -> Outcome | None:
    """The outcome where the falling costs meet the target, linear between two thresholds."""
    for (low, before), (high, after) in itertools.pairwise(enumerate(spent)):
        if before >= target >= after and before > after:
            share = (before - target) / (before - after)
            parts = [_outcome(exits[place], predictions, report) for place in (low, high)]
            weights = (1 - share, share)
            mean = [sum(w * p[i] for w, p in zip(weights, parts, strict=True)) for i in (0, 1, 2)]
            return Outcome(mean[0], report.layers[-1] / mean[1], mean[2])
    return None


def _outcome(exits: Tensor, predictions: Tensor, report: Recording) -> tuple[Any, float, Any]:
    answers = predictions.gather(0, exits[None])[0]
    layers = torch.tensor(report.layers)[exits].double().mean().item()
    return (answers == report.labels).double().numpy(), layers, _shares(exits, report)


def _join(a: Outcome | None, b: Outcome | None) -> Outcome | None:
    if a is None or b is None:
        return None
    layers = (1 / a.layer_ratio + 1 / b.layer_ratio) / 2
    return Outcome(np.concatenate((a.right, b.right)), 1 / layers, (a.shares + b.shares) / 2)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of the 95 % interval of Student's t over seeds; None below three."""
    array = np.asarray(values, dtype=float)
    if len(array) < 3:
        return float(array.mean()), None
    half = STUDENT.get(len(array) - 1, 2.0) * array.std(ddof=1) / len(array) ** 0.5
    return float(array.mean()), float(half)


# ------------------------------------------------------------------------------------ report


def layout_name(heads: str | Sequence[str]) -> str:
    """The heads of all exits as one string."""
    return heads if isinstance(heads, str) else " ".join(heads)


def measured_costs(
    classes: int, size: int, heads: str | Sequence[str], batch_size: int
) -> dict[str, Any]:
    """Seconds of the parts of an engine with these heads, and of a dense one, at a batch size."""
    torch.manual_seed(0)
    model = lgvit_fast.create_model(MODEL, num_classes=classes, img_size=size, heads=heads).eval()
    costs = measure_costs(model, batch_size, rounds=15)
    never = [0.0] * len(model.exits) + [1.0]
    headless = dataclasses.replace(
        costs, heads=tuple((0.0,) * len(costs.batches) for _ in costs.heads[:-1]) + costs.heads[-1:]
    )
    return {"costs": dataclasses.asdict(costs), "dense": headless.per_image(never, batch_size)}


def cost_functions(
    recording: Recording, heads: str | Sequence[str], size: int, clock: dict[str, Any] | None
) -> dict[str, tuple[Cost, float]]:
    """By `layers`, `multiply_adds` and `clock`: cost of a histogram, and of the dense model."""
    layers = np.asarray(recording.layers, dtype=float)
    model = lgvit_fast.LGViT(
        lgvit_fast.create_model(MODEL, num_classes=recording.num_classes, img_size=size).backbone,
        exits=[int(layer) for layer in layers[:-1]],
        heads=heads,
    )
    work, dense = cumulative_multiply_adds(
        model.exits, size // 16, model.backbone.embed_dim, recording.num_classes
    )
    functions: dict[str, tuple[Cost, float]] = {
        "layers": (lambda shares: float(shares @ layers), float(layers[-1])),
        "multiply_adds": (
            lambda shares: float(shares @ np.asarray(work, dtype=float)),
            float(dense),
        ),
    }
    if clock is not None:
        costs = Costs(**clock["costs"])
        functions["clock"] = (lambda shares: costs.per_image(shares.tolist()), clock["dense"])
    return functions


def tables(report: dict[str, Any], runs: Path, size: int) -> dict[str, Any]:
    """For each set, recipe and cost: accuracy in % at each ratio, and the difference to LGViT's."""
    result: dict[str, Any] = {}
    names: dict[tuple[str, str], list[int]] = {}
    layouts: dict[str, Any] = {}
    for run in report["runs"]:
        names.setdefault((run["set"], run["training"]), []).append(run["seed"])
        base = RECIPES.get(run["settings"]["recipe"], RECIPES["lgvit"])
        layouts[run["training"]] = run["settings"]["heads"] or base.heads
    for (images, training), seeds in names.items():
        for recipe in (training, "pcee") if training == "pabee" else (training,):
            rows = result.setdefault(images, {})
            files = [runs / f"{images}-{training}-{seed}.safetensors" for seed in seeds]
            recordings = [load_recording(file) for file in files]
            full = [100 * recording.final_accuracy for recording in recordings]
            row: dict[str, Any] = {"seeds": seeds, "full_depth": interval(full)}
            rows[recipe] = row
            if training == "dense":
                continue
            base = RECIPES.get(recipe) or RECIPES["lgvit"]
            kind = KINDS[type(base.policy).__name__]
            row["accuracy_by_layer"] = dict(
                zip(
                    recordings[0].layers,
                    np.mean([r.accuracies for r in recordings], axis=0).round(4).tolist(),
                    strict=True,
                )
            )
            heads = layouts[training]
            clock = report.get("costs", {}).get(images, {}).get(layout_name(heads))
            costs = cost_functions(recordings[0], heads, size, clock)
            steps = (*RATIOS, *np.arange(1.1, 3.0, 0.1).round(1).tolist())
            for axis, (cost, dense) in costs.items():
                found = [halves(recording, kind, steps, cost, dense) for recording in recordings]
                row[axis] = {
                    f"{ratio}": [
                        None
                        if outcome[place] is None
                        else (outcome[place].right, outcome[place].layer_ratio)
                        for outcome in found
                    ]
                    for place, ratio in enumerate(steps)
                }
    for rows in result.values():
        reference = rows.get("lgvit", {})
        for recipe, row in rows.items():
            for axis in ("layers", "multiply_adds", "clock"):
                if axis in row and recipe != "lgvit":
                    row[axis] = _summarised(row[axis], reference.get(axis), row, reference)
        for axis in ("layers", "multiply_adds", "clock"):
            if axis in reference:
                reference[axis] = _summarised(reference[axis], None, reference, reference)
    return result


def _summarised(
    cells: dict[str, Any], reference: dict[str, Any] | None, row: Any, other: Any
) -> dict[str, Any]:
    """Mean and interval over seeds of the accuracy in %, and of the paired difference to LGViT's."""
    summary = {}
    for ratio, seeds in cells.items():
        if any(cell is None for cell in seeds):
            continue
        entry: dict[str, Any] = {
            "accuracy": interval([100 * right.mean() for right, _ in seeds]),
            "layer_ratio": float(np.mean([layer_ratio for _, layer_ratio in seeds])),
        }
        if reference is not None and all(cell is not None for cell in reference[ratio]):
            theirs = dict(zip(other["seeds"], reference[ratio], strict=True))
            both = [
                100 * (right - theirs[seed][0])
                for seed, (right, _) in zip(row["seeds"], seeds, strict=True)
                if seed in theirs
            ]
            if both:
                entry["over_lgvit"] = interval([pair.mean() for pair in both])
                images = np.concatenate(both)
                entry["over_lgvit_images"] = 1.96 * float(images.std() / len(images) ** 0.5)
        summary[ratio] = entry
    return summary


def markdown(result: dict[str, Any], axis: str) -> str:
    """A table a data set: accuracy in %, with the half of its 95 % interval over seeds."""
    lines = []
    for images, rows in result.items():
        lines += [f"\n{TITLES[images]}, by {axis}\n"]
        lines += ["| recipe | seeds | full depth | " + " | ".join(f"{r}x" for r in RATIOS) + " |"]
        lines += ["|---|---:" + "|---:" * (len(RATIOS) + 1) + "|"]
        for recipe, row in rows.items():
            cells = [_cell(row["full_depth"])]
            for ratio in RATIOS:
                entry = row.get(axis, {}).get(f"{ratio}")
                cells.append("-" if entry is None else _cell(entry["accuracy"]))
            lines.append(f"| `{recipe}` | {len(row['seeds'])} | " + " | ".join(cells) + " |")
        for recipe, row in rows.items():
            over = [row.get(axis, {}).get(f"{r}", {}).get("over_lgvit") for r in RATIOS]
            if any(over):
                shown = ["-" if o is None else ("+" if o[0] > 0 else "") + _cell(o) for o in over]
                lines.append(f"| `{recipe}` over `lgvit` | | | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(value: Sequence[float | None]) -> str:
    mean, half = value
    return f"{mean:.1f}" + ("" if half is None else f" ± {half:.1f}")


STYLES = {
    "lgvit_joint": ("#d1242f", "o"),
    "lgvit": ("#1f77b4", "s"),
    "vit_ee": ("#2a9d4a", "^"),
    "sdn": ("#e07b00", "v"),
    "pabee": ("#8e5bbf", "D"),
    "pcee": ("#b5477d", "P"),
    "berxit": ("#8a8f98", "X"),
}
AXES = {
    "layers": "blocks of the model / mean blocks run",
    "clock": "dense engine's time / time (predicted from its parts, batch 32)",
}


def picture(result: dict[str, Any], file: Path) -> None:
    """Accuracy against layer ratio and against predicted speed-up, a row a data set."""
    axes_shown = [
        a for a in AXES if any(a in row for rows in result.values() for row in rows.values())
    ]
    figure = Figure(
        figsize=(5.4 * len(axes_shown), 4.2 * len(result)), dpi=130, layout="constrained"
    )
    grid = figure.subplots(len(result), len(axes_shown), squeeze=False, sharey="row")
    for line, (images, rows) in zip(grid, result.items(), strict=True):
        for axes, axis in zip(line, axes_shown, strict=True):
            if "dense" in rows:
                dense = rows["dense"]["full_depth"][0]
                axes.axhline(
                    dense, color="#24292f", linestyle=(0, (4, 3)), linewidth=1, label="dense"
                )
            for recipe, (colour, marker) in STYLES.items():
                curve = rows.get(recipe, {}).get(axis, {})
                points = sorted((float(r), *entry["accuracy"]) for r, entry in curve.items())
                if not points:
                    continue
                x, y, half = zip(*points, strict=True)
                axes.plot(x, y, color=colour, marker=marker, markersize=3.5, label=recipe)
                if all(h is not None for h in half):
                    low, high = np.subtract(y, half), np.add(y, half)
                    axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
            axes.set_title(TITLES[images])
            axes.set_xlabel(AXES[axis])
            axes.set_xlim(1.05, 2.5)
            axes.grid(alpha=0.25)
        line[0].set_ylabel("top-1 accuracy, %")
    grid[0][0].legend(fontsize=8, loc="lower left")
    FigureCanvasAgg(figure)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="json, tables are added to it")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes_real"))
    parser.add_argument("--figure", type=Path, help="png")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32, help="of the predicted times")
    parser.add_argument("--time", action="store_true", help="measure the engine's parts first")
    args = parser.parse_args()
    report = json.loads(args.results.read_text())
    if args.time:
        report["costs"] = {
            images: {
                layout_name(heads): measured_costs(classes, args.size, heads, args.batch_size)
                for heads in ("lgvit", "linear", "vit_ee", LOCAL_LINEAR)
            }
            for images, classes in (("cifar10", 10), ("tiny_imagenet", 200))
        }
    report["tables"] = tables(report, args.runs, args.size)
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    for axis in ("layers", "multiply_adds", "clock"):
        print(markdown(report["tables"], axis))
    if args.figure:
        picture(report["tables"], args.figure)


if __name__ == "__main__":
    main()
