"""Registers our models with timm as soon as timm is imported, and not before.

timm, and torch under it, take seconds to import; `import lgvit_fast` alone needs neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_with_timm"]


def register_with_timm() -> None:
    """Register now if timm is there already, else right after it has been imported."""
    if "timm" in sys.modules:
        importlib.import_module("lgvit_fast.registry")
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Finds timm as the other finders do, and adds the registration to its loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                importlib.import_module("lgvit_fast.registry")

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
