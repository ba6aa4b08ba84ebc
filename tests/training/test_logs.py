"""What a run shows: a bar on a terminal, a line for each validation in a file."""

import sys

import pytest

from lgvit_fast.training.logs import RunLog

ACCURACY = {"epoch": 1, "final_accuracy": 0.5, "exit_accuracy": [0.25]}


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("progress", [False, True], ids=["quiet", "progress"])
def test_the_bar_is_for_terminals(tmp_path, capsys, monkeypatch, terminal, progress):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    log = RunLog(tmp_path, "stage1", 3, 0, tensorboard=False, progress=progress)
    for update in range(3):
        log.advance(4)
        log.train(update + 1, {"loss": 1.0})
    log.validation(3, ACCURACY)
    log.close()
    shown = capsys.readouterr().err
    assert ("update/s" in shown or "s/update" in shown) == (terminal and progress)
    assert shown.count("epoch 1: final 0.5000, exits 0.250") == int(progress)
    if not terminal:
        assert shown.count("\n") == int(progress)
