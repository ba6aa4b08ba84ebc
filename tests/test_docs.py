"""Every snippet of every page runs, links lead somewhere, tables say what the code says."""

import importlib.util
import json
import re
import shutil
from collections import Counter

import nbformat
import pytest
import timm
from nbclient import NotebookClient

from lgvit_fast.cli.train import configure
from lgvit_fast.training.recipes import RECIPES
from tests.pages import PAGES, ROOT, blocks, check, furnish, narrow, run_page

LANGUAGES = {"python", "sh", "json", "text", "yaml", "cpp"}

# Why a block may be left out, and how many may say so. A new reason is a decision, not an accident.
REASONS = {
    "measures for minutes": 16,
    "trains for minutes": 11,
    "needs hundreds of images": 5,
    "needs the network": 4,
    "needs files of other programs": 3,
    "needs several processes": 2,
    "serves until it is stopped": 1,
    "needs a GPU": 2,
}


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """A folder with the images and models that pages speak of."""
    folder = tmp_path_factory.mktemp("furnished")
    furnish(folder)
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text())], ids=lambda p: p.stem)
def test_every_snippet_runs(page, furnished, tmp_path, monkeypatch):
    """Each page in a copy of that folder; models are built narrow."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(timm, "create_model", narrow(timm.create_model))
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_are_of_known_kinds(page):
    text = page.read_text()
    found = blocks(text)
    assert {block.language for block in found} - {"setup"} <= LANGUAGES
    marks = len(re.findall(r"^<!-- (?:not run|setup)", text, re.MULTILINE))
    used = [block for block in found if block.reason or block.language == "setup"]
    assert marks == len(used), "a mark that is not directly before a block"
    for block in found:
        if block.language == "json":
            for line in block.code.splitlines():
                json.loads(line)


def test_commands_stand_in_fences():
    """A command in an indented block would escape the other tests."""
    for page in PAGES:
        outside = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        programs = r"^ {4,}(lgvit-fast|python|pip|make|pytest|torchrun) "
        assert not re.search(programs, outside, re.MULTILINE), page


def test_few_blocks_are_left_out():
    reasons = Counter(b.reason for page in PAGES for b in blocks(page.read_text()) if b.reason)
    assert not {r: n for r, n in reasons.items() if n > REASONS.get(r, 0)}


@pytest.mark.parametrize(
    "command",
    ["lgvit-fast train --no-such-option", "make nothing", "python examples/none.py", "unknown x"],
)
def test_wrong_commands_are_found(command, capsys):
    with pytest.raises((SystemExit, AssertionError)):
        check(command)


def test_a_wrong_snippet_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_anchors_exist(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in slugs


class TestReadme:
    TEXT = (ROOT / "README.md").read_text()

    def test_is_short(self):
        assert len(self.TEXT.split()) < 600

    def test_links_once(self):
        links = re.findall(r"\]\(([^)]+)\)", self.TEXT)
        assert not {link: n for link, n in Counter(links).items() if n > 1}

    def test_speeds_are_those_measured(self):
        """Each ratio of the table is a row of the json that its command wrote."""
        for trace, file, label, way in (
            ("0.9", "vitb", "`Engine`", "engine"),
            ("0.9", "vitb", "exported, OpenVINO", "deployed, OpenVINO"),
            ("0.8", "vitb_08", "exported, OpenVINO", "deployed, OpenVINO"),
        ):
            path = ROOT / f"benchmarks/results/cpu_runtimes_{file}.json"
            rows = json.loads(path.read_text())["rows"]
            measured = {(row["way"], row["batch_size"]): row["speedup"] for row in rows}
            (row,) = re.findall(rf"^\| `Confidence\({trace}\)`, {label} \|.*$", self.TEXT, re.M)
            speeds = [cell.strip() for cell in row.split("|")[4:6]]
            assert speeds == [f"{measured[way, batch]:.2f}x" for batch in (1, 16)]


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}})
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "layer ratio" in printed


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
