"""Imports point one way, and docs/architecture.md names every room."""

import ast
import graphlib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lgvit_fast"

# A room imports from its own row and from rows above. Modules that are no room (clock, watch, ...)
# may be imported by all; that nothing goes in circles holds for them too.
ORDER = [
    {"kernels"},
    {"ops"},
    {"heads", "backbones", "policies", "outputs"},
    {"segments"},
    {"model", "runtimes"},
    {"inference", "data"},
    {"training", "deploy", "evaluation", "checkpoints"},
    {"bench", "serve", "scale"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# Imports against the order, each with its reason: at the top of a file, and inside functions.
AT_THE_TOP: dict[tuple[str, str], str] = {}
IN_FUNCTIONS = {
    ("model", "checkpoints"): "save_pretrained and its like are methods of the model",
    ("model", "data"): "predict takes files",
}


def sources() -> dict[Path, str]:
    """Every file of the package and its room."""
    found = dict.fromkeys((ROOT / "kernels").glob("*.py"), "kernels")
    for file in PACKAGE.rglob("*.py"):
        found[file] = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return found


def imports(tree: ast.AST) -> set[str]:
    """The rooms that code imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lgvit_fast.")}
    return found


def edges(tree_of=lambda text: ast.parse(text)) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found = defaultdict(set)
    for file, room in sources().items():
        found[room] |= imports(tree_of(file.read_text())) - {room}
    return found


def at_the_top(text: str) -> ast.AST:
    """The module without function bodies."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return tree


def against(order: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The imports that point upwards."""
    return {
        (room, other)
        for room, others in order.items()
        for other in others
        if LEVEL.get(other, -1) > LEVEL.get(room, len(ORDER))
    }


def test_imports_point_one_way():
    assert against(edges(at_the_top)) == set(AT_THE_TOP)
    assert against(edges()) == set(AT_THE_TOP) | set(IN_FUNCTIONS)


def test_an_import_against_the_order_is_seen():
    assert against({"ops": {"model"}, "model": {"ops"}, "cli": {"bench"}}) == {("ops", "model")}
    assert imports(ast.parse("def f():\n    from lgvit_fast.cli import main")) == {"cli"}


def test_nothing_goes_in_circles():
    """Among all modules at import time, those that are no room too."""
    modules = set(sources().values()) - {"__init__", "__main__"}
    graph = {room: others & modules for room, others in edges(at_the_top).items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_every_room_has_its_place_in_the_order():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(LEVEL)


@pytest.mark.parametrize("name", sorted({p.parent.name for p in ROOT.glob("*/*/__init__.py")}))
def test_the_page_names_every_room(name):
    assert f"`{name}/`" in (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("folder", ["csrc", "kernels", "tests", "benchmarks"])
def test_the_page_names_every_top_folder(folder):
    assert (ROOT / folder).is_dir()
    assert f"`{folder}/`" in (ROOT / "docs" / "architecture.md").read_text()
