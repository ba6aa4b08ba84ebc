"""The files around the package: citation, templates, the workflow, the list of slow tests."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import SLOW

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_citation_names_the_library_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["authors"] == [{"name": "The lgvit_fast developers"}]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["title"] == "LGViT: Dynamic Early Exiting for Accelerating Vision Transformer"
    assert paper["url"] == PROJECT["urls"]["Paper"]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_are_complete(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_workflow_runs_what_developers_run():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_ci_calls_things_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    for target in re.findall(r"^make ([\w-]+)", script, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for path in re.findall(r"^(\.ci/[\w-]+)", script, re.MULTILINE):
        assert (ROOT / path).stat().st_mode & 0o111


def test_the_smoke_test_is_on_the_oldest_supported_versions():
    script = (ROOT / ".ci" / "smoke-oldest").read_text()
    versions = dict(re.findall(r"\b(torch|timm)=([\d.]+)", script))
    for dependency in PROJECT["dependencies"]:
        name, _, oldest = dependency.partition(">=")
        if name in versions:
            assert f"{versions[name]}.".startswith(f"{oldest}.")


def test_slow_tests_exist():
    for entry in SLOW:
        file, _, name = entry.partition("::")
        text = (ROOT / file).read_text()
        assert not name or re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE), entry
