"""Rules for values that come from files: of what type and how large, checked before they are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Rule", "choice", "flag", "integer", "number", "one_or_list", "require", "text", "word"]

_LONGEST = 512  # of a list of sizes: one number a block is the most that any model takes


@dataclass(frozen=True)
class Rule:
    """What a value may be.

    Attributes:
        expected: in words, for the error.
        holds: whether a value obeys; must not raise, whatever it is given.
    """

    expected: str
    holds: Callable[[Any], bool]


def integer(low: int, high: int) -> Rule:
    """An integer of this range; no boolean."""
    return Rule(
        f"an integer from {low} to {high}",
        lambda value: (
            isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        ),
    )


def number(low: float, high: float) -> Rule:
    """A finite number of this range; no boolean."""
    return Rule(
        f"a number from {low:g} to {high:g}",
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and low <= value <= high
        ),
    )


def choice(*known: Any) -> Rule:
    """One of these."""
    return Rule(f"one of {', '.join(map(repr, known))}", lambda value: value in known)


def one_or_list(rule: Rule, depth: int = 1) -> Rule:
    """One such value, or a list of them, `depth` lists deep at most."""

    def holds(value: Any, left: int = depth) -> bool:
        if not isinstance(value, list | tuple):
            return rule.holds(value)
        return left > 0 and 0 < len(value) <= _LONGEST and all(holds(v, left - 1) for v in value)

    return Rule(f"{rule.expected}, or a list of them", holds)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 64 and value.replace("_", "a").isalnum()


flag = Rule("true or false", lambda value: isinstance(value, bool))
text = Rule("a string", lambda value: isinstance(value, str))
word = Rule("a name of letters, digits and _", lambda value: _is_word(value) and value.isascii())


def require(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    """Check the values that have a rule; None passes, it stands for the default.

    Args:
        values: by name.
        rules: by name.
        where: put before a name in the error.

    Raises:
        ValueError: naming the value, and what was expected.
    """
    for name, value in values.items():
        rule = rules.get(name)
        if rule is not None and value is not None and not rule.holds(value):
            shown = repr(value)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            raise ValueError(f"{where}{name} is {shown}, expected {rule.expected}")
