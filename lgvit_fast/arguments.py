"""Types of command-line arguments, and the error for arguments that cannot be meant."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

__all__ = ["UsageError", "count", "natural", "not_negative", "numbers", "pair"]


class UsageError(ValueError):
    """Arguments that cannot be meant: exit code 2."""


def count(text: str) -> int:
    """An argument that is an integer of at least 1."""
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def natural(text: str) -> int:
    """An argument that is an integer of at least 0."""
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value


def not_negative(text: str) -> float:
    """An argument that is a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def numbers(text: str) -> float | list[float]:
    """An argument that is one number, or several with commas between them."""
    values = [_number(part) for part in text.split(",")]
    return values[0] if len(values) == 1 else values


def pair(text: str) -> tuple[str, Any]:
    """An argument KEY=VALUE; the value is json, or else the text that it is."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
