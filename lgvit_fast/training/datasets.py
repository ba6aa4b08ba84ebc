"""The datasets that a training config names, and the transforms it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch

from lgvit_fast.data.batches import Source
from lgvit_fast.data.digits import Digits
from lgvit_fast.data.seeds import generator
from lgvit_fast.data.sources import ImageSource, class_names, open_dataset
from lgvit_fast.data.transforms import InputSpec, eval_transform
from lgvit_fast.training.config import DistillConfig, TrainConfig

__all__ = ["Data", "train_transform", "validation_folder"]


@dataclass(frozen=True)
class Data:
    """The datasets that a config names, opened but not yet tied to a model's input.

    Attributes:
        config: what named them.
        train: a map-style dataset of PIL images; None for the digits.
        validation: likewise; None where a part of `train` is held out.
        class_names: of the training images; empty where the dataset has no names.
    """

    config: TrainConfig
    train: Any
    validation: Any
    class_names: list[str]

    @classmethod
    def open(cls, config: TrainConfig) -> Data:
        """Open what `config` names.

        Raises:
            FileNotFoundError: if a path does not exist, or a named dataset is not there.
            ValueError: if a place holds no images, or the two parts name different classes.
        """
        if config.data == "digits" and not config.dataset:
            names = [str(digit) for digit in range(10)] if config.labelled else []
            return cls(config, None, None, names)
        train = open_dataset(config.data, config.dataset, config.train_split, config.download)
        validation = _open_validation(config)
        if not config.labelled:
            return cls(config, train, validation, [])
        names, val_names = class_names(train), class_names(validation)
        if names and val_names and names != val_names:
            odd = ", ".join(sorted(set(names) ^ set(val_names))[:5])
            raise ValueError(f"training and validation images differ in their classes: {odd}")
        return cls(config, train, validation, names)

    def sources(self, spec: InputSpec, smallest: tuple[int, int] = (1, 1)) -> tuple[Source, Source]:
        """Training and validation images as a model with this input wants them.

        Args:
            spec: the model's input.
            smallest: height and width in pixels below which an image counts as unreadable.
        """
        config, fixed = self.config, has_fixed_crops(self.config)
        if self.train is None:
            augment = config.augment and not fixed
            train_digits = Digits("train", spec, augment=augment, seed=config.seed)
            return train_digits, Digits("validation", spec)
        mode = "L" if spec.channels == 1 else "RGB"
        positions = val_positions = None
        if self.validation is None:
            shuffle = generator(config.seed, "held out")
            order = torch.randperm(len(self.train), generator=shuffle).tolist()
            held_out = max(round(config.val_fraction * len(order)), 1)
            val_positions, positions = sorted(order[:held_out]), sorted(order[held_out:])
        validation = self.train if self.validation is None else self.validation
        transforms = (
            eval_transform(spec) if fixed else train_transform(config, spec),
            eval_transform(spec),
        )
        seed, labels = config.seed, config.labelled
        return (
            ImageSource(self.train, transforms[0], mode, seed, positions, labels, smallest),
            ImageSource(validation, transforms[1], mode, seed, val_positions, labels, smallest),
        )


def has_fixed_crops(config: TrainConfig) -> bool:
    """Whether every epoch sees the same crops of the training images, those of evaluation."""
    if not isinstance(config, DistillConfig):
        return False
    return config.cache is not None or not config.augment


def train_transform(config: TrainConfig, spec: InputSpec) -> Any:
    """The training transform, timm's: PIL image to normalised tensor `[C, H, W]`."""
    return timm.data.create_transform(
        (spec.channels, *spec.size),
        is_training=True,
        no_aug=not config.augment,
        scale=config.crop_scale,
        hflip=config.hflip,
        color_jitter=config.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=config.auto_augment,
        re_prob=config.random_erasing,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
    )


def _open_validation(config: TrainConfig) -> Any:
    """The validation dataset, or None where it has to be held out from the training images."""
    if config.val_data is not None:
        return open_dataset(config.val_data, "", config.val_split)
    if config.dataset:
        return open_dataset(config.data, config.dataset, config.val_split, config.download)
    folder = validation_folder(config)
    return None if folder is None else open_dataset(config.data, "", folder.name)


def validation_folder(config: TrainConfig) -> Path | None:
    """The sub-folder of `data` with the validation images, or None if there is none."""
    names = (config.val_split, "val", "valid", "validation", "eval", "evaluation")
    folders = [Path(config.data) / name for name in names]
    return next((folder for folder in folders if folder.is_dir()), None)
