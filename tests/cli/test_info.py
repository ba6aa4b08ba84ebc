"""`lgvit-fast info`: complete, with and without the extension."""

import json

import torch

from lgvit_fast import _extension
from lgvit_fast.cli import main


def test_text_names_versions_ops_and_backends(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for op in ("compact_", "lph_pool", "gah_pool", "exit_step"):
        assert op in text


def test_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"]["torch"] == torch.__version__
    assert {"compact_", "lph_pool", "gah_pool", "exit_step"} <= {
        row["op"] for row in facts["ops"]["cpu"]
    }
    assert facts["extension"]["loaded"] is (_extension.why_missing() is None)


def test_a_missing_extension_is_said_with_its_cure(monkeypatch, capsys):
    reason = f"the extension is not built; {_extension.HOW_TO_BUILD}"
    monkeypatch.setattr(_extension, "_facts", None)
    monkeypatch.setattr(_extension, "_problem", reason)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "not built" in text
    missing = text.partition("missing\n")[2]
    assert "pip install" in missing
