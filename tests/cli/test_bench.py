"""`lgvit-fast bench`: a suite's options and exit code are its own."""

import pytest

from lgvit_fast.cli import main
from lgvit_fast.cli.bench import SUITES


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_gets_its_options_and_gives_the_exit_code(suite, monkeypatch):
    seen = []
    monkeypatch.setattr(f"lgvit_fast.bench.{suite}.run", lambda args: seen.append(args.rounds) or 7)
    assert main(["bench", suite, "--rounds", "3"]) == 7
    assert seen == [3]


def test_a_suite_must_be_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench"])
    assert stop.value.code == 2
    assert "SUITE" in capsys.readouterr().err
