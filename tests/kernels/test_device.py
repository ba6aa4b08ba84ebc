"""Kernel tests run on the GPU where there is one, as tests marked `gpu`."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.kernels import conftest


@pytest.mark.parametrize("on_gpu", [True, False], ids=["gpu", "interpreter only"])
def test_where_each_file_runs(monkeypatch, on_gpu):
    monkeypatch.setattr(conftest, "ON_GPU", on_gpu)
    monkeypatch.setattr(conftest, "INTERPRETED", False)
    marks = {}

    def item(folder, name):
        path = folder / name
        return SimpleNamespace(path=path, add_marker=lambda mark: marks.setdefault(name, mark.name))

    folder = Path(conftest.__file__).parent
    items = [item(folder, name) for name in ("test_lph.py", "test_gah.py", "test_table.py")]
    conftest.pytest_collection_modifyitems([*items, item(folder.parent, "test_model.py")])
    assert marks == dict.fromkeys(("test_lph.py", "test_gah.py"), "gpu" if on_gpu else "skip")
