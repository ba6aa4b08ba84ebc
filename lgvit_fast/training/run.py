"""A whole run: data, model, one stage after the other.

Example:
    >>> config = TrainConfig(model="vit_tiny_patch16_224", data="flowers", output="runs/flowers")
    >>> result = train(config)
    >>> result.model  # the best one, in eval mode
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from lgvit_fast.checkpoints.files import shortened
from lgvit_fast.data.batches import Source
from lgvit_fast.data.classes import Relabelled, match_classes
from lgvit_fast.data.seeds import seed_all
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.model import LGViT
from lgvit_fast.training.config import DistillConfig, TrainConfig
from lgvit_fast.training.datasets import Data
from lgvit_fast.training.distillation import (
    begin,
    patch_size,
    require_enough_images,
    split_held_out,
)
from lgvit_fast.training.identity import load_model, load_stage1
from lgvit_fast.training.lock import locked
from lgvit_fast.training.loop import BEST, CHECKPOINT, StageResult, train_stage
from lgvit_fast.training.process import Process
from lgvit_fast.training.start import starting_model

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """A run's outcome.

    Attributes:
        model: the last stage's best model, in eval mode.
        stages: `stage1`, `stage2`, as far as they were run.
        output: the run's folder.
    """

    model: LGViT
    stages: dict[str, StageResult]
    output: Path


def train(config: TrainConfig, model: LGViT | None = None, data: Data | None = None) -> TrainResult:
    """Train as `config` says.

    Under torchrun every process trains on its part of each batch (`batch_size` is per process).

    Args:
        config: the whole run.
        model: train this one, rather than the one that `config` names. With `stage="2"` it is taken
            as it is, unless `config.stage1_from` names another's weights.
        data: the images, already opened; None opens what `config` names.

    Returns:
        The best model and how good it is.

    Raises:
        FileExistsError: if `output` holds a run and `resume` is not set, or another process is
            running in it.
        FileNotFoundError: if data, or the stage 1 model that stage 2 needs, are not there.
        ValueError: if a checkpoint belongs to another model or config, naming what differs; or the
            images have classes that the model does not know, naming them.
        BadImageError: at an unreadable image, unless `skip_bad_images`.
        FloatingPointError: if the loss is no longer finite.
        ConnectionError: if another process of a torchrun has ended.
    """
    output = Path(config.output)
    names = ["stage1", "stage2"] if config.stage == "both" else [f"stage{config.stage}"]
    _refuse_used(output, names, config)
    process = Process.start(config.device)
    data = data or Data.open(config)
    with locked(output) if process.primary else nullcontext():
        if process.primary:
            _refuse_used(output, names, config)  # by a run that ended just now
        return _train(config, model, process, data, names)


def _refuse_used(output: Path, names: list[str], config: TrainConfig) -> None:
    used = [output / name for name in names if (output / name / CHECKPOINT).exists()]
    if used and not config.resume:
        raise FileExistsError(
            f"{used[0]} holds a run; resume it (resume=True) or choose another output"
        )


def _train(
    config: TrainConfig, model: LGViT | None, process: Process, data: Data, names: list[str]
) -> TrainResult:
    output = Path(config.output)
    seed_all(config.seed, "init")
    given = model is not None or config.init is not None
    if model is None:
        model = starting_model(config, data.class_names)
    if config.stage == "2" and config.labelled and (config.stage1_from or not given):
        load_stage1(config.stage1_from or output / "stage1" / BEST, model)
    model.to(process.device)
    sources = _sources(config, data, model)
    if isinstance(config, DistillConfig):
        checkpoint = output / names[0] / CHECKPOINT
        sources = begin(config, model, sources, process, checkpoint)
    stages = {}
    for name in names:
        stages[name] = train_stage(name, model, sources, config, process)
        load_model(stages[name].best, model)
    model.freeze_backbone(False)
    return TrainResult(model.eval(), stages, output)


def _sources(config: TrainConfig, data: Data, model: LGViT) -> tuple[Source, Source]:
    """The images, their classes matched with the model's by name; a model without names gets theirs."""
    names = data.class_names
    if names and model.class_names is None:
        if len(names) > model.num_classes:
            raise ValueError(
                f"the model has {model.num_classes} classes, the images {len(names)}:"
                f" {shortened(names)}"
            )
        if len(names) == model.num_classes:
            model.class_names = names
    where = f"{config.dataset} {config.data}".strip()
    try:
        places = match_classes(names, model.class_names, where)
    except ValueError as error:
        raise ValueError(
            f"{error}; give it new classifiers to train it on them (model.reset_classifier(n), or"
            " new_classes=True beside init)"
        ) from error
    if isinstance(config, DistillConfig):
        train, held_out = data.sources(InputSpec.of(model.backbone), patch_size(model))
        require_enough_images(train, held_out)
        return train, split_held_out(config, held_out)[0]
    train, validation = data.sources(InputSpec.of(model.backbone))
    if places is None or model.class_names is None:
        return train, validation
    return (
        Relabelled(train, places, model.class_names),
        Relabelled(validation, places, model.class_names),
    )
