"""The page's charts, as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lgvit_fast.evaluation.report.rows import Row
from lgvit_fast.evaluation.tradeoff import Point

__all__ = ["exits_chart", "speed_chart", "tradeoff_chart"]

_WIDTH, _HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44


class _Plot:
    """A plane with two linear axes."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], title: str) -> None:
        self.x_ticks, self.y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
        self.parts: list[str] = []
        self.title = title

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point of the plane in the picture, held inside it."""
        low_x, high_x = self.x_ticks[0], self.x_ticks[-1]
        low_y, high_y = self.y_ticks[0], self.y_ticks[-1]
        across = min(max((x - low_x) / (high_x - low_x), 0), 1)
        up = min(max((y - low_y) / (high_y - low_y), 0), 1)
        place_x = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        return round(place_x, 1), round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1)

    def axes(self, x_label: str, y_label: str, x_unit: str = "") -> None:
        """Grid, numbers and labels."""
        for tick in self.y_ticks:
            x, y = self.at(self.x_ticks[0], tick)
            self.add(f'<line class="grid" x1="{x}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>')
            self.text(x - 6, y + 4, f"{tick:g}", "end")
        for tick in self.x_ticks:
            x, _ = self.at(tick, self.y_ticks[0])
            self.text(x, _HEIGHT - _BOTTOM + 17, f"{tick:g}{x_unit}", "middle")
        self.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "middle", "label")
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        self.add(
            f'<text class="label" text-anchor="middle" transform="translate(12 {middle}) rotate(-90)">'
            f"{escape(y_label)}</text>"
        )

    def line(self, places: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        self.add(f'<polyline class="line {kind}" points="{self._list(places)}"/>')

    def band(self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]]) -> None:
        """The area between two lines."""
        self.add(f'<polygon class="band" points="{self._list([*low, *reversed(high)])}"/>')

    def dot(self, place: tuple[float, float], kind: str, about: str, radius: float = 3) -> None:
        """A point, with what it is as its tooltip."""
        x, y = self.at(*place)
        self.add(
            f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="{radius}">'
            f"<title>{escape(about)}</title></circle>"
        )

    def whisker(self, x: float, low: float, high: float, kind: str) -> None:
        """An interval of y."""
        (place, bottom), (_, top) = self.at(x, low), self.at(x, high)
        self.add(f'<line class="line {kind}" x1="{place}" y1="{bottom}" x2="{place}" y2="{top}"/>')

    def text(self, x: float, y: float, words: str, anchor: str, kind: str = "tick") -> None:
        """Words at a place in the picture."""
        self.add(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(words)}</text>"
        )

    def add(self, part: str) -> None:
        """A piece of SVG."""
        self.parts.append(part)

    def svg(self) -> str:
        """The picture."""
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(self.parts)}</svg>"
        )

    def _list(self, places: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x},{y}" for x, y in (self.at(*place) for place in places))


def tradeoff_chart(
    points: Sequence[Point], chosen: Point, fixed: Sequence[tuple[float, float]], full: float
) -> str:
    """Accuracy against layer ratio, with 95 % intervals.

    Args:
        points: thresholds, with accuracies.
        chosen: the policy in use.
        fixed: layer ratio and accuracy in [0, 1] if every image left at one exit.
        full: accuracy in [0, 1] of the final classifier.
    """
    height = {id(p): 100 * (p.accuracy or 0.0) for p in [*points, chosen]}
    low = max(min(100 * full, height[id(chosen)]) - 12, 0)
    seen = [p for p in points if height[id(p)] >= low] or list(points)
    bands = {id(p): _percent(p.accuracy_interval) for p in [*seen, chosen]}
    close = [(x, 100 * y) for x, y in fixed if 100 * y >= low]
    ends = [end for band in bands.values() for end in band] + [y for _, y in close]
    ratios = [p.layer_ratio for p in seen] + [x for x, _ in close] + [chosen.layer_ratio, 1.0]
    plot = _Plot(ratios, [max(min(ends), low), min(max(ends), 100)], "accuracy against depth")
    plot.axes("layer ratio: all blocks / blocks run on average", "accuracy, %", "×")
    plot.band(
        [(p.layer_ratio, bands[id(p)][0]) for p in seen],
        [(p.layer_ratio, bands[id(p)][1]) for p in seen],
    )
    plot.line([(plot.x_ticks[0], 100 * full), (plot.x_ticks[-1], 100 * full)], "full")
    plot.line(close, "fixed")
    for x, y in close:
        plot.dot((x, y), "fixed", f"all images at one exit: {x:.2f}×, {y:.1f} %", 2.5)
    plot.line([(p.layer_ratio, height[id(p)]) for p in seen], "early")
    for p in seen:
        about = f"{p.policy}: {p.layer_ratio:.2f}×, {height[id(p)]:.1f} %"
        plot.dot((p.layer_ratio, height[id(p)]), "early", about, 2.5)
    plot.whisker(chosen.layer_ratio, *bands[id(chosen)], "chosen")
    about = f"{chosen.policy}: {chosen.layer_ratio:.2f}×, {height[id(chosen)]:.1f} %"
    plot.dot((chosen.layer_ratio, height[id(chosen)]), "chosen", about, 6)
    return plot.svg()


def speed_chart(rows: Sequence[Row], size: int) -> str:
    """Accuracy, with 95 % intervals, against milliseconds an image at one batch size, a dot a way."""
    rows = [row for row in rows if size in row.ms]
    ends = [100 * end for row in rows for end in row.accuracy_interval]
    times = [row.ms[size].median for row in rows]
    plot = _Plot([0, *times], [max(min(ends), 0), min(max(ends), 100)], "accuracy against time")
    plot.axes(f"ms an image, batch {size}", "accuracy, %")
    for row in rows:
        kind = "rival" if row.way.rival else "early" if row.way.early else "full"
        kind += " int8" if row.way.precision == "int8" else ""
        time, low, high = row.ms[size].median, *row.accuracy_interval
        plot.whisker(time, 100 * low, 100 * high, f"thin {kind}")
        about = f"{row.way}: {time:.3g} ms, {100 * row.accuracy:.1f} %"
        plot.dot((time, 100 * row.accuracy), kind, about, 5)
    return plot.svg()


def exits_chart(
    layers: Sequence[int], shares: Sequence[float], expected: Sequence[float] | None
) -> str:
    """Where images leave: a bar a classifier, and a mark where the calibration images left.

    Args:
        layers: the blocks before the classifiers, from 1.
        shares: part of the images in [0, 1] that left at each.
        expected: the same of the calibration images, or None.
    """
    top = 100 * max(*shares, *(expected or [0]))
    plot = _Plot([0, 1], [0, top], "where images leave")
    width = (_WIDTH - _LEFT - _RIGHT) / len(layers)
    for tick in plot.y_ticks:
        x, y = plot.at(0, tick)
        plot.add(f'<line class="grid" x1="{x}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>')
        plot.text(x - 6, y + 4, f"{tick:g}", "end")
    for place, (layer, share) in enumerate(zip(layers, shares, strict=True)):
        left, (_, high) = _LEFT + (place + 0.14) * width, plot.at(0, 100 * share)
        final = place == len(layers) - 1
        words = f"block {layer}{' (final classifier)' if final else ''}: {100 * share:.1f} %"
        plot.add(
            f'<rect class="bar{" final" if final else ""}" x="{left:.1f}" y="{high}"'
            f' width="{0.72 * width:.1f}" height="{_HEIGHT - _BOTTOM - high:.1f}" rx="2">'
            f"<title>{escape(words)}</title></rect>"
        )
        center = left + 0.36 * width
        plot.text(center, _HEIGHT - _BOTTOM + 17, str(layer), "middle")
        plot.text(center, high - 4, f"{100 * share:.0f}", "middle")
        if expected is not None:
            _, y = plot.at(0, 100 * expected[place])
            plot.add(
                f'<line class="mark" x1="{left - 3:.1f}" y1="{y}"'
                f' x2="{left + 0.72 * width + 3:.1f}" y2="{y}"/>'
            )
    plot.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "leaves after block", "middle", "label")
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    plot.add(
        f'<text class="label" text-anchor="middle" transform="translate(12 {middle}) rotate(-90)">'
        "images, %</text>"
    )
    return plot.svg()


def _percent(interval: tuple[float, float] | None) -> tuple[float, float]:
    low, high = interval or (0.0, 1.0)
    return 100 * low, 100 * high


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose a range."""
    span = max(high - low, 1e-6 + 1e-3 * abs(high))
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
