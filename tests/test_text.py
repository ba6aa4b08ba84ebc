"""Names that could harm a terminal or a table."""

import csv
import io
import json

import pytest

from lgvit_fast.text import csv_field, json_line, printable

HOSTILE = [
    "\x1b[31mred",
    "a\r\nb",
    "\x85\x9b",
    "\u202egnp.exe",
    "\u2028\u2029",
    "\udcff",
    "\x00\x7f",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_no_control_character_is_left(text):
    for shown in (printable(text), csv_field(text), json_line(text)):
        assert shown.isascii() and shown.isprintable()
    assert json.loads(json_line(text)) == text
    assert csv_field(text).encode().decode("unicode_escape") == text


@pytest.mark.parametrize("text", ["katze.png", "Größe 漢字 👩‍🚀", "a,b", '"quoted"'])
def test_ordinary_names_stay(text):
    assert printable(text) == csv_field(text) == text


def test_a_backslash_is_told_from_an_escape():
    assert csv_field("\\x1b") == "\\\\x1b" != csv_field("\x1b")
    assert printable("C:\\x") == "C:\\x"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum"])
def test_formulas(text):
    assert csv_field(text) == text
    assert csv_field(text, no_formula=True) == "'" + text
    file = io.StringIO()
    csv.writer(file).writerow([csv_field(text, no_formula=True)])
    assert file.getvalue().startswith("'")
