"""Two pictures: accuracy against depth, and sample images by the exit they left at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import cycle

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lgvit_fast.checkpoints.files import write_atomic
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.evaluation.evaluate import Evaluation
from lgvit_fast.evaluation.tradeoff import curves

__all__ = ["denormalise", "exits_figure", "plot_exits", "plot_tradeoff", "tradeoff_figure"]

_COLOURS = ("#1f77b4", "#e07b00", "#2a9d4a", "#8e5bbf", "#b5477d")
_GREY, _RED, _INK = "#8a8f98", "#d1242f", "#24292f"


def plot_tradeoff(evaluation: Evaluation, path: str | os.PathLike[str], title: str = "") -> None:
    """Write `tradeoff_figure` as a PNG.

    Args:
        evaluation: what to draw.
        path: of the PNG.
        title: above the picture.
    """
    _save(tradeoff_figure(evaluation, title), path)


def tradeoff_figure(evaluation: Evaluation, title: str = "") -> Figure:
    """Accuracy against layer ratio: the swept policies, the chosen one, and fixed exits.

    Curves of which no point lies in the picture are left out, of the legend too.
    """
    recording, chosen = evaluation.recording, evaluation.chosen
    height = 100 * (chosen.accuracy or 0.0)
    low_end, high_end = chosen.accuracy_interval or (0.0, 1.0)
    figure = Figure(figsize=(7.2, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    final, depth = 100 * recording.final_accuracy, recording.layers[-1]
    axes.axhline(
        final,
        color=_INK,
        linewidth=1,
        linestyle=(0, (4, 3)),
        label=f"every image to the end: {final:.1f} % (band: {evaluation.tolerance:g} below)",
    )
    axes.axhspan(final - evaluation.tolerance, final, color=_INK, alpha=0.06, linewidth=0)
    fixed = [
        (depth / layer, 100 * accuracy)
        for layer, accuracy in zip(recording.layers, recording.accuracies, strict=True)
    ]
    drawn = [("every image at the same exit", _GREY, fixed)]
    for (name, points), colour in zip(
        curves(evaluation.points).items(), cycle(_COLOURS), strict=False
    ):
        curve = [(point.layer_ratio, 100 * (point.accuracy or 0.0)) for point in points]
        drawn.append((f"each image at its own exit: {name}", colour, curve))
    # so far below the final classifier no one would choose a threshold; closer up one would see noise
    low = max(min(final, height) - 12, 0)
    drawn = [entry for entry in drawn if any(accuracy >= low for _, accuracy in entry[2])]
    for label, colour, curve in drawn:
        axes.plot(*zip(*curve, strict=True), color=colour, marker="o", markersize=4, label=label)
    axes.errorbar(
        chosen.layer_ratio,
        height,
        yerr=[[height - 100 * low_end], [100 * high_end - height]],
        capsize=3,
        marker="*",
        markersize=17,
        color=_RED,
        markeredgecolor="white",
        linestyle="none",
        label=_chosen_label(evaluation),
        zorder=5,
    )
    seen = [place for _, _, curve in drawn for place in curve if place[1] >= low]
    axes.set_xlim(0.9, 1.06 * max(chosen.layer_ratio, *(ratio for ratio, _ in seen)))
    heights = [final - 2, *(accuracy for _, accuracy in seen)]
    axes.set_ylim(min(heights) - 1, max(heights) + 1)
    axes.set_xlabel(f"layer ratio: all {depth} blocks / blocks run on average")
    axes.set_ylabel("accuracy, %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    return figure


def plot_exits(
    evaluation: Evaluation,
    path: str | os.PathLike[str],
    spec: InputSpec,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write `exits_figure` as a PNG.

    Args:
        evaluation: what to draw.
        path: of the PNG.
        spec: how its images were normalised.
        class_names: of the model's classes, in their order; None shows their numbers.
    """
    _save(exits_figure(evaluation, spec, class_names), path)


def exits_figure(
    evaluation: Evaluation, spec: InputSpec, class_names: Sequence[str] | None = None
) -> Figure:
    """Images in one row per exit under the chosen policy, the wrongly answered ones framed in red."""
    examples, recording, chosen = evaluation.examples, evaluation.recording, evaluation.chosen
    pictures = denormalise(examples.images, spec)
    counts = torch.bincount(examples.exit_index, minlength=len(chosen.shares)).tolist()
    rows = [row for row, count in enumerate(counts) if count]
    columns = max(12, *counts)

    height = 0.45 + 0.66 * len(rows)
    figure = Figure(figsize=(8.4, height), dpi=120)
    grid = figure.add_gridspec(
        len(rows), columns, left=0.26, right=0.995, top=1 - 0.4 / height, bottom=0.05 / height,
        wspace=0.08, hspace=0.1,
    )  # fmt: skip
    line = 1 - 0.08 / height
    figure.text(0.01, line, "Where images leave", va="top", fontweight="bold", color=_INK)
    figure.text(
        0.995,
        line,
        "red: wrong, with the answer given",
        va="top",
        ha="right",
        fontsize=8,
        color=_RED,
    )
    for place, row in enumerate(rows):
        box = grid[place, 0].get_position(figure)
        middle = (box.y0 + box.y1) / 2
        layer = recording.layers[row]
        where = f"after block {layer}" + (" (final)" if row == recording.num_exits else "")
        figure.text(0.01, middle, where, va="bottom", fontsize=9, fontweight="bold", color=_INK)
        share, accuracy = chosen.shares[row], chosen.exit_accuracy[row] or 0.0
        summary = f"{100 * share:.1f} % leave, {100 * accuracy:.1f} % right"
        figure.text(0.01, middle - 0.03 / height, summary, va="top", fontsize=8, color=_GREY)
        for column, index in enumerate((examples.exit_index == row).nonzero().flatten().tolist()):
            wrong = None
            if not examples.right[index]:
                number = int(examples.prediction[index])
                wrong = class_names[number] if class_names else str(number)
            _draw(figure.add_subplot(grid[place, column]), pictures[index], wrong)
    return figure


def denormalise(images: Tensor, spec: InputSpec) -> Tensor:
    """Preprocessed images `[n, C, H, W]` as pictures in [0, 1], `[n, H, W, C]` (no C for one)."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    pictures = (images.float().cpu() * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1)
    return pictures[:, 0] if spec.channels == 1 else pictures.permute(0, 2, 3, 1)


def _draw(axes: Axes, picture: Tensor, wrong_answer: str | None) -> None:
    """One sample; the answer in red if it was wrong."""
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    if wrong_answer is None:
        axes.spines[:].set(color=_GREY, linewidth=0.4)
        return
    axes.spines[:].set(color=_RED, linewidth=2)
    axes.text(
        0.06,
        0.94,
        wrong_answer[:9],
        transform=axes.transAxes,
        va="top",
        fontsize=7,
        color="white",
        bbox={"facecolor": _RED, "edgecolor": "none", "pad": 1},
    )


def _chosen_label(evaluation: Evaluation) -> str:
    chosen = evaluation.chosen
    accuracy = 100 * (chosen.accuracy or 0.0)
    label = f"{chosen.policy}: {accuracy:.1f} %, {chosen.layer_ratio:.2f}× in layers"
    if not evaluation.timings:
        return label
    clock = ", ".join(f"{t.ratio.median:.2f}× at batch {t.batch_size}" for t in evaluation.timings)
    return f"{label};\nby the clock {clock}"


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    write_atomic(path, lambda file: figure.savefig(file, format="png", facecolor="white"))
