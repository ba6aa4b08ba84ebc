"""Rows of a check: each is measured, judged against its target, and written before the next begins."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgvit_fast.checkpoints.files import save_json
from lgvit_fast.clock import Spread


class Skipped(Exception):
    """A row cannot be measured here; the message says why."""


class TimeUp(BaseException):
    """The budget ended within a row. No library between here and the row may catch it as an error."""


@dataclass(frozen=True)
class Measured:
    """What a row gives.

    Attributes:
        value: in the row's unit.
        spread: quartiles, of what was repeated.
        floor: what arithmetic or bytes allow at best on this device, in the row's unit.
        target: the bound to hold; None if the row has none.
        at_least: the value shall be no less than the target; else no more.
        facts: more to know of it, as json types.
    """

    value: float
    spread: tuple[float, float] | None = None
    floor: float | None = None
    target: float | None = None
    at_least: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spread: Spread, **more: Any) -> Measured:
        """The median of repeated measurements."""
        return cls(spread.median, (spread.low, spread.high), **more)

    @property
    def verdict(self) -> str:
        """ "pass" or "miss"; "measured" without a target."""
        if self.target is None:
            return "measured"
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return "pass" if met else "miss"


class Known(dict[str, float]):
    """Values of the rows so far, by name."""

    def __missing__(self, name: str) -> float:
        raise Skipped(f"it needs {name!r}, which has no value")


@dataclass(frozen=True)
class Row:
    """One figure: its name, its unit, and what measures it, given the values of earlier rows."""

    name: str
    unit: str
    work: Callable[[Known], Measured]


def ratio(name: str, ours: str, other: str, target: float | None = None) -> Row:
    """How many times faster `ours` is than `other`, both of them rows of times."""

    def work(known: Known) -> Measured:
        return Measured(known[other] / known[ours], target=target, at_least=True)

    return Row(name, "x", work)


class Record:
    """Measures rows until the budget is spent; the json is whole after every row.

    Args:
        path: of the json.
        seconds: the budget. The row that runs when it ends is stopped, later ones are skipped.
        about: what else the json says.
        rehearsal: no figure is a measurement; the json and each of its rows say so.
    """

    def __init__(
        self, path: Path, seconds: float, about: Mapping[str, Any], rehearsal: bool = False
    ) -> None:
        self.path, self.seconds, self.rehearsal = path, seconds, rehearsal
        self.known = Known()
        self.rows: list[dict[str, Any]] = []
        self._about, self._started = about, time.monotonic()
        self._write(finished=False)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.monotonic() - self._started)

    def run(self, rows: Iterable[Row]) -> None:
        """Measure the rows in their order."""
        for row in rows:
            self.rows.append(self._row(row))
            self._write(finished=False)
            print(_line(self.rows[-1]), flush=True)
        self._write(finished=True)

    def count(self, status: str) -> int:
        """How many rows ended so: "pass", "miss", "measured", "failed" or "skipped"."""
        return sum(row["status"] == status for row in self.rows)

    def _row(self, row: Row) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": row.name, "unit": row.unit}
        if self.rehearsal:
            entry["rehearsal"] = True
        begin = time.monotonic()
        try:
            if self.left <= 0:
                raise Skipped(f"the {self.seconds:g} s are up")
            with _alarm(self.left):
                found = row.work(self.known)
            if not math.isfinite(found.value):
                raise ValueError(f"the value is {found.value}")
        except Skipped as reason:
            return {**entry, "status": "skipped", "reason": str(reason)}
        except TimeUp:
            return {
                **entry,
                "status": "skipped",
                "reason": f"stopped: the {self.seconds:g} s are up",
            }
        except Exception as error:  # one row's failure must not lose the others' figures
            reason = f"{type(error).__name__}: {error}"
            return {**entry, "status": "failed", "reason": reason[:2000]}
        self.known[row.name] = found.value
        return {
            **entry,
            "status": found.verdict,
            "measured": found.value,
            "quartiles": found.spread,
            "floor": found.floor,
            "target": found.target,
            "target_is": "at least" if found.at_least else "at most",
            **found.facts,
            "seconds": round(time.monotonic() - begin, 2),
        }

    def _write(self, *, finished: bool) -> None:
        head = {"rehearsal": self.rehearsal, "finished": finished, "budget_s": self.seconds}
        spent = round(time.monotonic() - self._started, 1)
        save_json(self.path, {**head, "spent_s": spent, **self._about, "rows": self.rows})


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in what runs longer."""

    def stop(*_: Any) -> None:
        raise TimeUp

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _line(row: Mapping[str, Any]) -> str:
    if "measured" not in row:
        return f"{row['status']:8} {row['name']}: {row['reason'].splitlines()[0]}"
    text = f"{row['status']:8} {row['name']}: {row['measured']:.4g} {row['unit']}"
    if row["floor"] is not None:
        text += f", floor {row['floor']:.4g}"
    if row["target"] is not None:
        text += f", {row['target_is']} {row['target']:.4g}"
    return text
