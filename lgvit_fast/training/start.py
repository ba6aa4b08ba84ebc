"""The model that a run begins with: made anew, or taken from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lgvit_fast.checkpoints.files import load_json
from lgvit_fast.checkpoints.timm_files import from_timm
from lgvit_fast.heads import resolve_exits
from lgvit_fast.model import LGViT, create_model
from lgvit_fast.model_config import FORMAT
from lgvit_fast.training.recipes import RECIPES

if TYPE_CHECKING:
    from lgvit_fast.training.config import TrainConfig

__all__ = ["starting_model"]

_ON_THE_HUB = "hf-hub:"


def starting_model(config: TrainConfig, class_names: list[str]) -> LGViT:
    """What a config trains: its `model` made anew, or what `init` names.

    Args:
        config: the whole run.
        class_names: of the training images, empty if they have none.

    Raises:
        FileNotFoundError: `init` is not there.
        ValueError: what is in `init` contradicts the config, or no number of classes is known.
    """
    if config.init is not None and _is_saved(config.init):
        return _saved(config, class_names)
    if config.init is not None:
        return _from_timm(config, class_names)
    model = create_model(
        config.model,
        config.pretrained,
        exits=config.exits,
        heads=config.heads,
        num_classes=_num_classes(config, class_names),
        **config.model_kwargs,
    )
    return _with_policy(config, model)


def _is_saved(source: str) -> bool:
    """Whether a source is a model of this package, rather than timm's."""
    if source.startswith(_ON_THE_HUB):
        return True
    config = Path(source) / "config.json"
    if not config.exists():
        return False
    content = load_json(config)
    return isinstance(content, dict) and content.get("format") == FORMAT


def _saved(config: TrainConfig, class_names: list[str]) -> LGViT:
    model = LGViT.from_pretrained(str(config.init).removeprefix(_ON_THE_HUB))
    if config.model_kwargs:
        raise ValueError(
            f"model_kwargs is {config.model_kwargs}, but init is a saved model, which has its own"
        )
    if config.exits is not None or config.heads is not None:
        layers = [spec.layer for spec in model.exits]
        exits = layers if config.exits is None else config.exits
        asked = resolve_exits(exits, config.heads, model.num_blocks, model.adapter.depths)
        if asked != model.exits:
            own = ", ".join(f"{spec.head} after block {spec.layer}" for spec in model.exits)
            raise ValueError(
                f"exits and heads are {config.exits} and {config.heads}, but the model in init has"
                f" {own}; leave them out"
            )
    if config.new_classes:
        _refuse_stage2_alone(config)
        model.reset_classifier(_num_classes(config, class_names))
    elif config.num_classes not in (None, model.num_classes):
        raise ValueError(
            f"num_classes is {config.num_classes}, but the model in init has {model.num_classes}"
            " classes; new_classes=True gives it new classifiers"
        )
    return model


def _from_timm(config: TrainConfig, class_names: list[str]) -> LGViT:
    wanted = config.num_classes or len(class_names) or None
    model = from_timm(
        str(config.init),
        config.model,
        model_kwargs=config.model_kwargs,
        exits=config.exits,
        heads=config.heads,
    )
    other = model.class_names and class_names and set(model.class_names) != set(class_names)
    if config.new_classes or other or wanted not in (None, model.num_classes):
        _refuse_stage2_alone(config)
        model.reset_classifier(_num_classes(config, class_names))
    return _with_policy(config, model)


def _with_policy(config: TrainConfig, model: LGViT) -> LGViT:
    if config.recipe is not None:
        model.policy = RECIPES[config.recipe].policy_for(len(model.exits))
    return model


def _refuse_stage2_alone(config: TrainConfig) -> None:
    if config.stage == "2":
        raise ValueError(
            "stage is '2', in which the final classifier teaches the exits, but for these classes the"
            " model of init needs a new one: begin with stage 1"
        )


def _num_classes(config: TrainConfig, class_names: list[str]) -> int:
    if config.num_classes is not None:
        return config.num_classes
    if not class_names:
        raise ValueError(
            f"the dataset {config.dataset!r} does not name its classes: give num_classes"
        )
    return len(class_names)
