"""Layers at equal accuracy, counted by hand and over all rules."""

import json

import pytest
import torch

from benchmarks import decision_rules
from benchmarks.decision_rules import RULES, compare, fewest_layers, markdown
from lgvit_fast.evaluation import Recording
from lgvit_fast.evaluation.families import Scores


@pytest.fixture(scope="module")
def recording():
    """600 images of 5 classes in 3 exits, the deeper the surer; the first exit shouts."""
    rng = torch.Generator().manual_seed(3)
    targets = torch.randint(5, (600,), generator=rng)
    ease = torch.rand(600, generator=rng) * 5
    truth = torch.nn.functional.one_hot(targets, 5).float()
    noise = torch.randn(4, 600, 5, generator=rng)
    strength = torch.tensor([0.7, 1.1, 1.6, 2.5])[:, None, None] * ease[:, None]
    logits = truth * strength + noise
    logits[0] *= 30
    return Recording(logits, targets, (2, 4, 6, 8))


def test_fewest_layers_by_hand():
    """Ten images, one exit after block 2 of 4: the bolder, the more errors."""
    values = torch.arange(10, 0, -1).float()[None]  # image 0 leaves first
    predictions = torch.zeros(2, 10, dtype=torch.long)
    predictions[0, [4, 7]] = 1  # the exit errs on these two
    found = Recording(torch.zeros(2, 10, 2), torch.zeros(10, dtype=torch.long), (2, 4))
    layers = fewest_layers(found, Scores(values, predictions), (0, 10, 19, 20))
    assert layers == pytest.approx([3.2, 2.6, 2.6, 2.0])  # 4, 7, 7 and 10 images have left


def test_a_rule_that_errs_at_once_lets_nobody_leave():
    predictions = torch.stack((torch.ones(10), torch.zeros(10))).long()
    found = Recording(torch.zeros(2, 10, 2), torch.zeros(10, dtype=torch.long), (2, 4))
    assert fewest_layers(found, Scores(torch.ones(1, 10), predictions), (5,)) == [4]


def test_every_rule_is_compared(recording):
    rows = compare(recording, seeds=2)
    assert [row.rule for row in rows] == list(RULES)
    by_name = {row.rule: row for row in rows}
    assert by_name["confidence"].saved == by_name["confidence"].spread == (0, 0, 0, 0)
    assert all(list(row.layers) == sorted(row.layers, reverse=True) for row in rows)
    # the first exit is too sure: whatever learns how sure saves layers
    for rule in ("learned", "a temperature per exit"):
        assert by_name[rule].saved[2] > 5
    assert by_name["patient_confident"].saved[2] < by_name["learned"].saved[2]


def test_the_command(recording, tmp_path, capsys, monkeypatch):
    recording.save(tmp_path / "mine.safetensors")
    arguments = [str(tmp_path / "mine.safetensors"), "--seeds", "2", "--points", "1", "2"]
    options = ["--rules", "margin", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["decision_rules", *arguments, *options])
    decision_rules.main()
    written = json.loads((tmp_path / "out.json").read_text())["recordings"]["mine"]
    expected = compare(recording, ["margin"], (1.0, 2.0), 2)
    assert [row["rule"] for row in written] == ["confidence", "margin"]
    assert written[1]["saved"] == pytest.approx(expected[1].saved)
    assert capsys.readouterr().out.strip() == markdown({"mine": expected}, (1.0, 2.0))
