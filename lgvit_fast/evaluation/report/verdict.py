"""From measurements to a decision in plain words. Pure: rows in, sentences out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lgvit_fast.evaluation.report.rows import ENGINES, PRECISIONS, Row

__all__ = ["Verdict", "signed", "verdicts"]

SLACK = 1.03  # times closer than this are not told apart


@dataclass(frozen=True)
class Verdict:
    """What to do at one batch size.

    Attributes:
        batch_size: images a call.
        use_early_exit: whether one of the early-exit ways is worth it.
        headline: the decision, one sentence.
        sentences: what it rests on.
    """

    batch_size: int
    use_early_exit: bool
    headline: str
    sentences: tuple[str, ...]


def verdicts(rows: Sequence[Row], tolerance: float = 1.0) -> list[Verdict]:
    """A verdict for each batch size that was measured.

    Speeds are relative to the full model on its fastest runtime in float32, what would be used if
    there were no early exits. An early exit is worth it if it is faster than that, loses at most
    `tolerance` points, and nothing else within the tolerance (int8, a rival) is as fast, or as fast to
    3 % and more accurate.

    Args:
        rows: with at least one of the full model in float32.
        tolerance: percentage points of accuracy that may be lost.

    Raises:
        ValueError: no row of the full model in float32, or a negative tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r}, expected at least 0 points")
    if not any(_is_full(row) and row.way.precision == "float32" for row in rows):
        raise ValueError("rows hold no full model in float32, expected one to compare with")
    sizes = dict.fromkeys(size for row in rows for size in row.ms)
    return [_verdict([row for row in rows if size in row.ms], size, tolerance) for size in sizes]


def _verdict(rows: Sequence[Row], size: int, tolerance: float) -> Verdict:
    def ms(row: Row) -> float:
        return row.ms[size].median

    def fastest(some: Iterable[Row]) -> Row | None:
        return min(some, key=ms, default=None)

    full = {p: fastest(r for r in rows if _is_full(r) and r.way.precision == p) for p in PRECISIONS}
    early = {p: fastest(r for r in rows if r.way.early and r.way.precision == p and not r.way.rival)
             for p in PRECISIONS}  # fmt: skip
    base = full["float32"]
    assert base is not None
    speed = {row.way: ms(base) / ms(row) for row in rows}

    def what(row: Row) -> str:
        return f"{speed[row.way]:.1f}x at {signed(-row.drop)}"

    parts = []
    if row := early["float32"]:
        parts.append(f"early exit is {what(row)} points ({ENGINES[row.way.engine]})")
    if row := full["int8"]:
        parts.append(f"the int8 full model {what(row)} ({ENGINES[row.way.engine]})")
    if row := early["int8"]:
        parts.append(f"both together {what(row)} ({ENGINES[row.way.engine]})")
    for name in dict.fromkeys(row.way.rival for row in rows if row.way.rival):
        row = fastest(r for r in rows if r.way.rival == name)
        assert row is not None
        parts.append(f"{name} {what(row)} ({ENGINES[row.way.engine]}, {row.way.precision})")
    sentences = [
        f"The full model takes {ms(base):.3g} ms an image at best in float32"
        f" ({ENGINES[base.way.engine]}) and is {100 * base.accuracy:.1f} % right. Against that"
        f" {'; '.join(parts) or 'nothing else was measured'}."
    ]

    good = [row for row in rows if row.drop <= tolerance + 1e-9]
    candidates = [row for row in rows if row.way.early and not row.way.rival]
    chosen = fastest(row for row in candidates if row.drop <= tolerance + 1e-9)
    others = [row for row in good if row not in candidates and row is not base]
    reason = _why_not(chosen, candidates, base, others, size, tolerance, ms)
    if reason is None:
        assert chosen is not None
        headline = f"Use early exit on {_where(chosen)}: {what(chosen)} points."
        gain = f"{ms(base) / ms(chosen):.2f}x by the clock, {chosen.layer_ratio:.2f}x in layers"
        sentences.append(f"Of the ways that lose at most {tolerance:g} points it is best: {gain}.")
        low, high = chosen.drop_interval
        if high > tolerance:
            sentences.append(
                f"{chosen.images} images leave room for doubt: its loss lies between {low:.1f} and"
                f" {high:.1f} points (95 % interval), so more than the {tolerance:g} tolerated is"
                " possible. More images, or `lgvit-fast calibrate`, would settle it."
            )
    else:
        headline = f"Do not use early exit here: {reason}."
        instead = fastest([*others, base])
        assert instead is not None
        if instead is not base and speed[instead.way] >= SLACK:
            sentences.append(
                f"Of what loses at most {tolerance:g} points, {instead.way.model} on"
                f" {_where(instead)} is fastest: {what(instead)} points."
            )
    return Verdict(size, reason is None, headline, tuple(sentences))


def _why_not(
    chosen: Row | None,
    candidates: Sequence[Row],
    base: Row,
    others: Sequence[Row],
    size: int,
    tolerance: float,
    ms: Callable[[Row], float],
) -> str | None:
    """Why none of the early-exit rows is worth it; None if `chosen` is."""
    if not candidates:
        return "no way of running it could be measured"
    if chosen is None:
        least = min(candidates, key=lambda row: row.drop)
        return (
            f"it loses {least.drop:.1f} points under this policy, more than the {tolerance:g}"
            " tolerated (`lgvit-fast calibrate` finds a policy that keeps a goal)"
        )
    if ms(base) < SLACK * ms(chosen):
        return (
            f"the full model takes {ms(base):.3g} ms an image on {_where(base)}, early exit"
            f" {ms(chosen):.3g} on {_where(chosen)}"
        )
    for row in sorted(others, key=ms):
        as_fast = ms(row) < SLACK * ms(chosen) and row.drop <= chosen.drop
        if ms(chosen) > SLACK * ms(row) or as_fast:
            return (
                f"{_the(row)} on {_where(row)} takes {ms(row):.3g} ms an image and loses"
                f" {row.drop:.1f} points, early exit {ms(chosen):.3g} ms and {chosen.drop:.1f}"
            )
    return None


def _is_full(row: Row) -> bool:
    return not row.way.early and not row.way.rival


def _the(row: Row) -> str:
    if row.way.rival:
        return row.way.rival
    return "the int8 full model" if row.way.precision == "int8" else "the full model"


def _where(row: Row) -> str:
    return f"{ENGINES[row.way.engine]} in {row.way.precision}"


def signed(points: float) -> str:
    """A change in points, with its sign."""
    return "±0.0" if abs(points) < 0.05 else f"{points:+.1f}"
