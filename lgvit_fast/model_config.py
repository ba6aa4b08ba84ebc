"""What `LGViT.get_config` gives and config.json holds: its format, types and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lgvit_fast.backbones.timm_arguments import check_description
from lgvit_fast.heads import ExitSpec
from lgvit_fast.rules import Rule, choice, integer, require

__all__ = ["FORMAT", "check_config"]

FORMAT = "lgvit_fast/1"
_LARGEST_NUMBER = 1024  # of a head: a pooling stride or a ratio


def _is_exits(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= 512
        and all(isinstance(spec, Mapping) and set(spec) == {"layer", "head"} for spec in value)
        and all(isinstance(spec["head"], str) and len(spec["head"]) <= 32 for spec in value)
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_RULES = {
    "num_classes": integer(1, 10_000_000),
    "num_heads": integer(1, 1024),
    "pool": choice("subsample", "average"),
    "exits": Rule("a list of exits, each a layer and a head", _is_exits),
    "class_names": Rule("a list of strings", _is_names),
    "policy": Rule("a policy's name and arguments", lambda value: isinstance(value, Mapping)),
}


def check_config(config: Any) -> None:
    """Refuse a configuration that cannot be of a model.

    Raises:
        ValueError: another format, a missing entry, or one of another type or range, naming it.
    """
    if not isinstance(config, Mapping) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, Mapping) else config
        raise ValueError(f"the config has format {repr(found)[:80]}, expected {FORMAT!r}")
    needed = ("num_classes", "num_heads", "pool", "exits")
    missing = [key for key in needed if config.get(key) is None]
    missing += [] if "backbone" in config else ["backbone"]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    require(config, _RULES)
    for spec in config["exits"]:
        if (ExitSpec(**spec).number or 0) > _LARGEST_NUMBER:
            raise ValueError(
                f"head={spec['head']!r}, expected a number of at most {_LARGEST_NUMBER} in it"
            )
    if config["backbone"] is not None:
        check_description(config["backbone"])
