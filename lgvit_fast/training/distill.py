"""Exits for a trained classifier, from images without labels: the model itself is the teacher.

It is stage 2 without the cross-entropy, in the loop of every training here (`training.run.train`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import distributed, nn
from torch.utils.data import DataLoader, IterableDataset

from lgvit_fast.checkpoints.fingerprint import fingerprint
from lgvit_fast.data.batches import Batches, Loader
from lgvit_fast.data.seeds import seed_all
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.evaluation.calibration import Calibration, calibrate, require_enough
from lgvit_fast.evaluation.recording import record
from lgvit_fast.model import LGViT
from lgvit_fast.training.config import DistillConfig, distillation_stage
from lgvit_fast.training.datasets import Data
from lgvit_fast.training.distillation import patch_size, remove_cache, split_held_out
from lgvit_fast.training.run import train

__all__ = ["Distilled", "distill", "run_distillation"]


class Distilled(NamedTuple):
    """What came out.

    Attributes:
        model: the best one, in eval mode.
        agreement: of each exit with the full model on the held-out images, 0 to 1.
        images: how many held-out images that was measured on.
        calibration: of the policy, if it was asked for.
    """

    model: LGViT
    agreement: tuple[float, ...]
    images: int
    calibration: Calibration | None


def distill(
    model: LGViT | nn.Module | str | os.PathLike[str],
    images: Any,
    *,
    output: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    exits: int | Sequence[int] | None = None,
    heads: str | Sequence[str] | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    lr: float = 1e-3,
    min_agreement: float | None = None,
    warm_start: bool = True,
    cache: int | None = None,
    val_images: Any = None,
    resume: bool = False,
    stage2: Mapping[str, Any] | None = None,
    **options: Any,
) -> LGViT:
    """Give a trained classifier early exits that learn from its own answers.

    No labels are used, and none are needed. The backbone and its classifier stay as they are, bit for
    bit. The result is in `output`, as `save_pretrained` writes it; the run itself, which can be
    resumed, is in `output/run`.

    Args:
        model: an `LGViT` (its exits are trained in place); a timm model; the folder of a saved model,
            `hf-hub:user/model`, a timm folder or checkpoint; or the name of a timm model.
        images: a folder at any depth, a tar, a map-style dataset, or a `DataLoader` over one, whose
            dataset is taken. Items are PIL images, or tensors `[C, H, W]` that the model takes as they
            are, alone or first in a tuple.
        output: folder for the result.
        weights: a file with weights of the timm model that `model` names.
        model_kwargs: further arguments of that timm model.
        exits: as of `LGViT`, for a model that has none.
        heads: likewise.
        epochs: passes over the images.
        batch_size: images a batch.
        lr: peak learning rate.
        min_agreement: percent; calibrate the exit policy for it, on held-out images that took no part
            in the choice of the best epoch. None: the policy stays as it is.
        warm_start: begin with a least-squares fit to the model's logits instead of noise, in exits that
            were never trained.
        cache: most bytes on disk for tokens computed once for all epochs; fixes the crops. None: none.
        val_images: to validate on, as `images`; None holds out `val_fraction` of these.
        resume: go on with an interrupted run, exactly.
        stage2: further fields of `Stage2Config` (`beta`, `temperature`, `opt`, ...).
        **options: further fields of `DistillConfig` (`augment`, `workers`, `seed`, `device`,
            `precision`, `val_fraction`, `cache_folder`, `skip_bad_images`, ...).

    Returns:
        The model of the best epoch, by the agreement of its exits with itself on held-out images, in
        eval mode.

    Raises:
        FileNotFoundError: the model or the images are not there.
        FileExistsError: `output` holds a run and `resume` is not set, or another process uses it.
        ValueError: weights that do not fit, a model without a classifier, fewer than 50 images, too few
            for `min_agreement`, a cache that does not fit into `cache` bytes or is of something else.
        BadImageError: an unreadable image, or one smaller than a patch, unless `skip_bad_images`.
    """
    named = isinstance(model, str | os.PathLike)
    config = DistillConfig(
        output=str(Path(output) / "run"),
        init=str(weights if weights is not None else model) if named else None,
        model=str(model) if named and weights is not None else DistillConfig.model,
        model_kwargs=dict(model_kwargs or {}),
        exits=exits if exits is None or isinstance(exits, int) else list(exits),
        heads=heads if heads is None or isinstance(heads, str) else list(heads),
        data=str(images) if isinstance(images, str | os.PathLike) else type(images).__name__,
        val_data=None if val_images is None else str(val_images),
        batch_size=batch_size,
        min_agreement=min_agreement,
        warm_start=warm_start,
        cache=cache,
        resume=resume,
        stage2=distillation_stage(**{"epochs": epochs, "lr": lr, **(stage2 or {})}),
        **options,
    )
    if not named and weights is not None:
        raise ValueError("weights is given, but model is a model already, not a name")
    given = None if named else _wrapped(model, config)
    return run_distillation(config, given, _data(config, images, val_images)).model


def run_distillation(
    config: DistillConfig, model: LGViT | None = None, data: Data | None = None
) -> Distilled:
    """What `distill` does, and how well it went.

    Args:
        config: of the run; its `output` is the folder `run` inside that of the result.
        model: None takes the one that `config` names.
        data: likewise.
    """
    data = data or Data.open(config)
    _require_enough_to_calibrate(config, data)
    result = train(config, model, data)
    model = result.model
    _, held_out = data.sources(InputSpec.of(model.backbone), patch_size(model))
    validation, others = split_held_out(config, held_out)
    calibration = None
    if config.min_agreement is not None and others is not None:
        loader = Loader(
            others, Batches(len(others), config.batch_size, training=False), config.workers
        )
        recording = record(model, loader.epoch(), labelled=False)
        calibration = calibrate(
            recording,
            min_agreement=config.min_agreement,
            seed=config.seed,
            weights=fingerprint(model.state_dict()),
        )
        model.policy, model.certificate = calibration.policy, calibration.certificate
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        model.save_pretrained(Path(config.output).parent)
        remove_cache(config)
    stage = result.stages["stage2"]
    return Distilled(model, stage.accuracy.exits, len(validation), calibration)


def _require_enough_to_calibrate(config: DistillConfig, data: Data) -> None:
    """Say before the training, not after it, that `min_agreement` asks for more held-out images."""
    if config.min_agreement is None or data.train is None:
        return
    held_out = len(data.validation) if data.validation is not None else 0
    held_out = held_out or max(round(config.val_fraction * len(data.train)), 1)
    others = held_out - held_out // 3
    try:
        require_enough("min_agreement", config.min_agreement, 0.05, others - others // 2)
    except ValueError as error:
        raise ValueError(
            f"{error}; {held_out} images are held out, of which {others} calibrate: give more"
            " images, or a larger val_fraction"
        ) from error


def _wrapped(model: Any, config: DistillConfig) -> LGViT:
    if not isinstance(model, LGViT):
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is a {type(model).__name__}, expected a model or its name")
        seed_all(config.seed, "init")
        return LGViT(model, config.exits, heads=config.heads)
    if config.exits is not None or config.heads is not None:
        raise ValueError("exits and heads are given, but the model has its own: leave them out")
    return model


def _data(config: DistillConfig, images: Any, val_images: Any) -> Data:
    if isinstance(images, str | os.PathLike):
        if val_images is not None and not isinstance(val_images, str | os.PathLike):
            raise ValueError("val_images is a data set, but images a path: give two of one kind")
        return Data.open(config)
    validation = None if val_images is None else _dataset(val_images, "val_images")
    return Data(config, _dataset(images, "images"), validation, [])


def _dataset(images: Any, name: str) -> Any:
    """A map-style data set, out of its loader if it is in one."""
    dataset = images.dataset if isinstance(images, DataLoader) else images
    if isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    ):
        raise ValueError(
            f"{name} is a {type(images).__name__}, expected a path, a data set with a length and items,"
            " or a loader of one; the order of a stream cannot be resumed exactly"
        )
    return dataset
