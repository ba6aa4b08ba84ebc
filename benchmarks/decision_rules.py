"""Layers saved at equal accuracy by each decision rule, on recordings of any models.

    lgvit-fast eval MODEL --data PATH --save-recording recording.safetensors
    python -m benchmarks.decision_rules recording.safetensors --seeds 5 --json rules.json

A rule learns what it learns on one half of the images. On the other half its threshold is moved from
cautious to bold, and the fewest mean layers are taken at which no more points than allowed are lost to
the full model; they are compared with those of one confidence threshold on the same half. Means and
standard deviations over splits; negative: more layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.checkpoints.files import save_json
from lgvit_fast.evaluation import Recording
from lgvit_fast.evaluation.families import CERTIFIED_KINDS, Scores, family
from lgvit_fast.evaluation.learning import fit_learned
from lgvit_fast.ops.exit_step import ExitStep, apply_rule

__all__ = ["RULES", "Row", "compare", "fewest_layers", "markdown"]

BASE = "confidence"
POINTS = (0.25, 0.5, 1.0, 2.0)  # of accuracy
Rule = Callable[[Recording], Callable[[Recording], Scores]]


@dataclass(frozen=True)
class Row:
    """One rule on one recording.

    Attributes:
        rule: its name.
        layers: mean layers at each allowed loss, means over splits.
        saved: percent of the layers of `BASE` that it saves there, likewise.
        spread: standard deviations of `saved`.
    """

    rule: str
    layers: tuple[float, ...]
    saved: tuple[float, ...]
    spread: tuple[float, ...]


def _unlabelled(selection: Recording) -> Callable[[Recording], Scores]:
    return family("learned", Recording(selection.logits, None, selection.layers)).scores


def _together(selection: Recording) -> Callable[[Recording], Scores]:
    """The largest probability of the exits that answer together, without the logistic model."""
    fitted = fit_learned(selection)

    def scores(recording: Recording) -> Scores:
        state = fitted.start(len(recording), torch.device("cpu"))
        answers = []
        for index in range(recording.num_exits):
            logits = recording.logits[index]
            step = ExitStep(logits, *apply_rule(fitted.rule(index), logits, state[:, :2]))
            answers.append(fitted.score(step, state, index)[0])
        logits = torch.stack((*answers, recording.logits[-1]))
        return Scores(torch.softmax(logits[:-1].float(), -1).amax(-1), logits.argmax(-1))

    return scores


def _margin(selection: Recording) -> Callable[[Recording], Scores]:
    def scores(recording: Recording) -> Scores:
        first, second = torch.softmax(recording.logits[:-1].float(), -1).topk(2).values.unbind(-1)
        return Scores(first - second, recording.logits.argmax(-1))

    return scores


def _temperatures(selection: Recording) -> Callable[[Recording], Scores]:
    """A temperature for each exit, fitted to the classes; then one confidence threshold."""
    logits, count = selection.logits[:-1].double(), len(selection)
    tried = torch.logspace(-2, 2, 81, base=2, dtype=torch.float64)
    right = selection.labels.expand(len(logits), -1)[..., None]
    losses = [-torch.log_softmax(logits / t, -1).gather(-1, right).sum((1, 2)) for t in tried]
    best: Tensor = tried[(torch.stack(losses) / count).argmin(0)]

    def scores(recording: Recording) -> Scores:
        scaled = recording.logits[:-1].double() / best[:, None, None]
        return Scores(torch.softmax(scaled, -1).amax(-1).float(), recording.logits.argmax(-1))

    return scores


RULES: dict[str, Rule] = {
    **{kind: lambda half, kind=kind: family(kind, half).scores for kind in CERTIFIED_KINDS},  # type: ignore[misc]
    "learned, without labels": _unlabelled,
    "exits together, one confidence threshold": _together,
    "a temperature per exit": _temperatures,
    "margin": _margin,
}


def fewest_layers(recording: Recording, scores: Scores, points: Sequence[float]) -> list[float]:
    """Mean layers at the boldest threshold that loses at most so many points to the full model."""
    layers = torch.tensor(recording.layers, dtype=torch.float64)
    right = scores.predictions == recording.labels
    found = [(0.0, float(layers[-1]))]  # nobody leaves
    for threshold in scores.path(recording.layers):
        exits = scores.exits(threshold)
        kept = right.gather(0, exits[None])[0]
        drop = 100 * float(right[-1].double().mean() - kept.double().mean())
        found.append((drop, float(layers[exits].mean())))
    return [min(mean for drop, mean in found if drop <= most + 1e-9) for most in points]


def compare(
    recording: Recording,
    rules: Sequence[str] = tuple(RULES),
    points: Sequence[float] = POINTS,
    seeds: int = 5,
) -> list[Row]:
    """A row for each rule, `BASE` first.

    Args:
        recording: with targets.
        rules: keys of `RULES`.
        points: of accuracy that may be lost.
        seeds: splits.
    """
    names = list(dict.fromkeys((BASE, *rules)))
    halves = [recording.split(seed) for seed in range(seeds)]
    layers = {
        name: np.array(
            [fewest_layers(rest, RULES[name](half)(rest), points) for half, rest in halves]
        )
        for name in names
    }
    rows = []
    for name in names:
        saved = 100 * (1 - layers[name] / layers[BASE])
        means = (tuple(values.mean(0).tolist()) for values in (layers[name], saved))
        rows.append(Row(name, *means, tuple(saved.std(0).tolist())))
    return rows


def markdown(found: dict[str, list[Row]], points: Sequence[float] = POINTS) -> str:
    """A Markdown table, a column for each recording and number of points that may be lost."""
    cells = [f"{name}, -{lost:g}" for name in found for lost in points]
    lines = ["| rule | " + " | ".join(cells) + " |", "| --- |" + " ---: |" * len(cells)]
    for rows in zip(*found.values(), strict=True):
        if rows[0].rule == BASE:
            name = "one confidence threshold, mean layers"
            cells = [f"{value:.2f}" for row in rows for value in row.layers]
        else:
            name = rows[0].rule
            pairs = [pair for row in rows for pair in zip(row.saved, row.spread, strict=True)]
            cells = [f"{mean:.1f} ± {spread:.1f} %" for mean, spread in pairs]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", nargs="+", type=Path, metavar="RECORDING")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=tuple(RULES))
    parser.add_argument("--points", nargs="+", type=float, default=POINTS, metavar="P")
    parser.add_argument("--seeds", type=int, default=5, help="splits (5)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {
        path.stem: compare(Recording.load(path), args.rules, args.points, args.seeds)
        for path in args.recordings
    }
    print(markdown(found, args.points))
    if args.json:
        facts = {"points": list(args.points), "seeds": args.seeds}
        rows = {name: [vars(row) for row in rows] for name, rows in found.items()}
        save_json(args.json, {**facts, "recordings": rows})


if __name__ == "__main__":
    main()
