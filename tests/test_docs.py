"""The documents' Python and the examples run as they are written."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

from lgvit_fast.cli.train import configure
from lgvit_fast.training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["model", "backbones", "recipes", "checkpoints"])
def test_snippets_run_in_order(name):
    snippets = SNIPPET.findall((ROOT / "docs" / f"{name}.md").read_text())
    assert snippets
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for snippet in snippets:
            exec(compile(snippet, f"docs/{name}.md", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wrapping_a_model_of_ones_own(capsys):
    load("wrap_your_own_model").main(epochs=1)
    assert "threshold 1.0" in capsys.readouterr().out


@pytest.mark.slow
def test_comparing_two_recipes(tmp_path, capsys):
    arguments = [
        "--recipes",
        "sdn",
        "lgvit",
        "--stage0-epochs",
        "1",
        "--epochs",
        "2",
        "--width",
        "16",
    ]
    rows = load("compare_recipes").main([*arguments, "--size", "8", "--out", str(tmp_path)])
    assert set(rows) == {"sdn", "lgvit"}
    assert "| lgvit |" in capsys.readouterr().out


def test_the_table_of_recipes_is_that_of_the_code():
    text = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| `(\w+)`", text, re.MULTILINE)
    assert {name for name, *_ in rows} == set(RECIPES)
    for name, heads, strategy in rows:
        assert strategy == RECIPES[name].strategy
        assert RECIPES[name].heads in (heads.strip("` "), "lgvit")


def test_every_option_of_the_migration_table_exists():
    import argparse

    from lgvit_fast.cli import eval as evaluation

    parser = argparse.ArgumentParser()
    configure(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    parser = argparse.ArgumentParser()
    evaluation.configure(parser)
    known |= {option for action in parser._actions for option in action.option_strings}
    text = (ROOT / "examples" / "from_published_code.md").read_text()
    ours = " ".join(row.split("|")[2] for row in text.splitlines() if row.startswith("| `--"))
    used = set(re.findall(r"--[a-z][\w.-]*", ours))
    assert used
    assert used <= known | {"--nproc-per-node"}
