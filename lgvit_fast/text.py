"""Names of files and classes on their way to a terminal or a table, where they could do harm."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["csv_field", "json_line", "printable"]

# C0, DEL and C1 controls; line and paragraph separators; bidirectional controls; byte-order mark;
# surrogates, which stand for the bytes of a name that is not UTF-8
_UNSAFE = (
    "\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
)
_CONTROLS = re.compile(f"[{_UNSAFE}]")
_CONTROLS_AND_BACKSLASHES = re.compile(rf"[{_UNSAFE}\\]")
_FORMULA = ("=", "+", "-", "@")


def printable(text: str) -> str:
    """Text for a terminal: control characters and lone surrogates as Python escapes them."""
    return _CONTROLS.sub(_escaped, text)


def csv_field(text: str, no_formula: bool = False) -> str:
    """Text for a CSV field, one line and reversible: as `printable`, and a backslash is doubled.

    Args:
        text: any.
        no_formula: put an apostrophe before a leading `=`, `+`, `-` or `@`, which spreadsheets take
            for a formula.
    """
    escaped = _CONTROLS_AND_BACKSLASHES.sub(_escaped, text)
    return f"'{escaped}" if no_formula and escaped.startswith(_FORMULA) else escaped


def json_line(value: Any) -> str:
    """A value as one line of JSON in ASCII: everything else is escaped, lone surrogates too."""
    return json.dumps(value, ensure_ascii=True)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
