"""Results as text: tables that line up, and one line that says what was gained."""

from __future__ import annotations

from collections.abc import Sequence

from lgvit_fast.clock import Spread
from lgvit_fast.evaluation import Evaluation
from lgvit_fast.evaluation.timing import Timing
from lgvit_fast.evaluation.tradeoff import curves
from lgvit_fast.model import LGViT

__all__ = ["clock", "exit_table", "gain", "table", "timing_table", "tradeoff_table"]

_TITLES = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that line up: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *others)).rstrip())
    return "\n".join(lines)


def exit_table(evaluation: Evaluation, model: LGViT) -> str:
    """Each exit: who leaves there and how good their answers are."""
    recording, chosen = evaluation.recording, evaluation.chosen
    heads = [*(spec.head for spec in model.exits), "classifier"]
    rows = [
        [f"block {layer}", head, _percent(share), _percent(right), _percent(alone)]
        for layer, head, share, right, alone in zip(
            recording.layers,
            heads,
            chosen.shares,
            chosen.exit_accuracy,
            recording.accuracies,
            strict=True,
        )
    ]
    total = [*("all", ""), _percent(1.0), _percent(chosen.accuracy), ""]
    header = ["leaves after", "head", "images", "of these right", "right if all left here"]
    return table(header, [*rows, total])


def tradeoff_table(evaluation: Evaluation) -> str:
    """The swept policies, of neighbours alike one; the reported one is marked."""
    chosen = evaluation.chosen
    rows: list[list[str]] = []
    for points in curves(evaluation.points).values():
        last = 0.0
        for point in points:
            if point is not chosen and point.layer_ratio < 1.04 * last:
                continue
            last = point.layer_ratio
            rows.append(
                [
                    ("* " if point is chosen else "  ") + str(point.policy),
                    _percent(point.accuracy),
                    f"{-100 * (point.drop or 0.0):+.1f}",
                    _range(point.drop_interval, -100),
                    f"{point.layer_ratio:.2f}x",
                ]
            )
    header = ["  policy", "accuracy", "points to final", "95 % interval", "layer ratio"]
    return table(header, rows)


def timing_table(timings: Sequence[Timing]) -> str:
    """Wall clock beside the layer ratio of the same images; quartiles in brackets."""
    rows = [
        [
            str(timing.batch_size),
            f"{timing.dense_ms.median:.3f}",
            f"{timing.full_ms.median:.3f} {_TITLES[timing.full_runtime]}",
            f"{timing.early_ms.median:.3f} {_TITLES[timing.early_runtime]}",
            _ratio(timing.ratio),
            _ratio(timing.full_ratio),
            f"{timing.layer_ratio:.2f}x",
        ]
        for timing in timings
    ]
    header = [
        *("batch", "timm, ms/image", "full model, ms/image", "early exit, ms/image"),
        *("over timm", "over full model", "layer ratio"),
    ]
    return table(header, rows)


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f}x [{spread.low:.2f}, {spread.high:.2f}]"


def gain(evaluation: Evaluation) -> str:
    """One line: what early exit gains here, and what it costs."""
    chosen, final = evaluation.chosen, evaluation.recording.final_accuracy
    accuracy, change = chosen.accuracy or 0.0, -100 * (chosen.drop or 0.0)
    line = (
        f"Early exit runs {chosen.layer_ratio:.2f}x fewer blocks per image and answers"
        f" {100 * accuracy:.1f} % right [{_range(chosen.accuracy_interval)}], the full model"
        f" {100 * final:.1f} % ({change:+.1f} [{_range(chosen.drop_interval, -100)}])"
    )
    return f"{line}; {clock(evaluation.timings)}." if evaluation.timings else f"{line}."


def clock(timings: Sequence[Timing]) -> str:
    """How much faster early exit is, than timm's model and than the full model on the same engine."""
    gains = ", ".join(
        f"{timing.ratio.median:.2f}x as fast as timm's model at batch {timing.batch_size}"
        f" ({timing.full_ratio.median:.2f}x as the full model on {_TITLES[timing.full_runtime]})"
        for timing in timings
    )
    return f"by the clock it is {gains}"


def _range(interval: tuple[float, float] | None, factor: float = 100) -> str:
    """An interval of shares as percent, or as points with their sign turned."""
    if interval is None:
        return "-"
    low, high = sorted(factor * end for end in interval)
    return f"{low:+.1f}, {high:+.1f}" if factor < 0 else f"{low:.1f}, {high:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
