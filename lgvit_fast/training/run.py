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

from lgvit_fast.data.seeds import seed_all
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.model import LGViT, create_model
from lgvit_fast.training.config import TrainConfig
from lgvit_fast.training.datasets import Data
from lgvit_fast.training.identity import load_model, load_stage1
from lgvit_fast.training.lock import locked
from lgvit_fast.training.loop import BEST, CHECKPOINT, StageResult, train_stage
from lgvit_fast.training.process import Process
from lgvit_fast.training.recipes import RECIPES

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


def train(config: TrainConfig, model: LGViT | None = None) -> TrainResult:
    """Train as `config` says.

    Under torchrun every process trains on its part of each batch (`batch_size` is per process).

    Args:
        config: the whole run.
        model: train this one, rather than the one that `config` names.

    Returns:
        The best model and how good it is.

    Raises:
        FileExistsError: if `output` holds a run and `resume` is not set, or another process is
            running in it.
        FileNotFoundError: if data, or the stage 1 model that stage 2 needs, are not there.
        ValueError: if a checkpoint belongs to another model or config, naming what differs.
        BadImageError: at an unreadable image, unless `skip_bad_images`.
        FloatingPointError: if the loss is no longer finite.
    """
    output = Path(config.output)
    names = ["stage1", "stage2"] if config.stage == "both" else [f"stage{config.stage}"]
    _refuse_used(output, names, config)
    process = Process.start(config.device)
    data = Data.open(config)
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
    if model is None:
        model = create_model(
            config.model,
            config.pretrained,
            exits=config.exits,
            heads=config.heads,
            num_classes=_num_classes(config, data),
            **config.model_kwargs,
        )
        if config.recipe is not None:
            model.policy = RECIPES[config.recipe].policy_for(len(model.exits))
    if data.class_names and len(data.class_names) > model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, the images {len(data.class_names)}"
        )
    if len(data.class_names) == model.num_classes:
        model.class_names = data.class_names
    model.to(process.device)
    sources = data.sources(InputSpec.of(model.backbone))
    stages = {}
    for name in names:
        if name == "stage2":
            load_stage1(config.stage1_from or output / "stage1" / BEST, model)
        stages[name] = train_stage(name, model, sources, config, process)
        load_model(stages[name].best, model)
    model.freeze_backbone(False)
    return TrainResult(model.eval(), stages, output)


def _num_classes(config: TrainConfig, data: Data) -> int:
    if config.num_classes is not None:
        return config.num_classes
    if not data.class_names:
        raise ValueError(
            f"the dataset {config.dataset!r} does not name its classes: give num_classes"
        )
    return len(data.class_names)
