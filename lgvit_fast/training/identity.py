"""Whether two models on disk or in memory are the same one, and loading only if they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lgvit_fast import policies
from lgvit_fast.checkpoints.files import load_json, load_strictly, load_weights
from lgvit_fast.checkpoints.fit import malformed
from lgvit_fast.checkpoints.header import read_header
from lgvit_fast.model import LGViT
from lgvit_fast.model_config import check_config
from lgvit_fast.parameter_names import file_names
from lgvit_fast.training.checkpoint import Checkpoint, differences

__all__ = ["describe", "load_model", "load_stage1", "require_same"]


def describe(config: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What makes two models interchangeable: backbone, classes, exits and the shape of each weight.

    Args:
        config: what `LGViT.get_config` gives.
        shapes: of the state dict's tensors.
    """
    facts = {key: value for key, value in config.items() if key not in ("policy", "class_names")}
    facts["exits"] = [f"{spec['head']} after block {spec['layer']}" for spec in config["exits"]]
    if facts["backbone"] is not None:
        arguments = facts["backbone"]["args"].items()
        kept = {key: value for key, value in arguments if "drop" not in key}
        made = {key: value for key, value in facts["backbone"].items() if key != "data"}
        facts["backbone"] = {**made, "args": kept}
    facts["weights"] = {name: list(shape) for name, shape in file_names(shapes).items()}
    return facts


def load_stage1(path: str | Path, model: LGViT) -> None:
    """Make `model` what a stage 1 run made: a saved model folder, or its training checkpoint.

    Class names and policy are taken, too, where the source has them.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is of another stage, or of a model that differs, naming what does.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"stage 2 starts from a stage 1 model, and there is none at {path}; run stage 1 first, or"
            " name a saved model folder or a stage 1 checkpoint in stage1_from"
        )
    if path.is_dir():
        load_model(path, model)
        _adopt(load_json(path / "config.json"), model)
        return
    checkpoint = Checkpoint.load(path)
    if checkpoint.facts.get("stage") != "stage1":
        raise ValueError(
            f"{path} is a checkpoint of {checkpoint.facts.get('stage')}, not of stage1"
        )
    with malformed(path):
        require_same(path, checkpoint.facts["model"], describe_model(model))
        weights = checkpoint.state["ema"] or checkpoint.state["model"]
        load_strictly(model, weights, str(path))
        _adopt(checkpoint.state, model)


def load_model(folder: str | Path, model: LGViT) -> None:
    """Give `model` the weights of a saved one, after checking that they are the same model.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged or the two differ, naming what differs.
    """
    folder = Path(folder)
    config, path = load_json(folder / "config.json"), folder / "model.safetensors"
    with malformed(folder):
        check_config(config)
        saved = describe(config, read_header(path).shapes)
        require_same(folder, saved, describe_model(model))
    load_strictly(model, load_weights(path), str(path))


def _adopt(saved: Mapping[str, Any], model: LGViT) -> None:
    """Take class names and policy, where they were saved."""
    if saved.get("class_names"):
        model.class_names = saved["class_names"]
    if saved.get("policy"):
        model.policy = policies.from_dict(saved["policy"])


def describe_model(model: LGViT) -> dict[str, Any]:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return describe(model.get_config(), shapes)


def require_same(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    found = differences(saved, current)
    if found:
        raise ValueError(f"{path} holds another model: " + "; ".join(found))
