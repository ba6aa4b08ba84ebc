"""Where the images come from: any map-style timm dataset, or the bundled digits.

A source turns keys `(epoch, position)` into a `Batch`. `Batches` decides which keys, as a function of
(seed, epoch) alone, and a sample's augmentation is a function of (seed, epoch, position) alone, so
training can stop and go on anywhere in an epoch, with any number of loader workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lgvit_fast.training.batch import BadImage, Batch, InputSpec, Key, Source
from lgvit_fast.training.config import TrainConfig
from lgvit_fast.training.digits import Digits
from lgvit_fast.training.rng import generator, seeded


class ImageSource:
    """Images of a map-style dataset, decoded and transformed.

    Args:
        dataset: a timm `ImageDataset`, or a torchvision-like one of (image, class) items.
        transform: PIL image to tensor `[C, H, W]`.
        mode: PIL mode to convert to, `RGB` or `L`.
        seed: of the transform's randomness.
        positions: which items of the dataset, in order; None: all.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Image.Image], Tensor],
        mode: str = "RGB",
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.mode = mode
        self.seed = seed
        self.positions = range(len(dataset)) if positions is None else positions
        self.class_names = class_names(dataset)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        images, targets, bad = [], [], []
        for epoch, position in keys:
            index = self.positions[position]
            with seeded(self.seed, "sample", epoch, position):
                try:
                    image, target = self._read(index)
                    images.append(self.transform(image))
                    targets.append(int(target))
                # PIL reports bad files as OSError, SyntaxError (PNG) or ValueError
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    bad.append(BadImage(self.name(index), f"{type(error).__name__}: {error}"))
        stacked = torch.stack(images) if images else torch.empty(0)
        return Batch(stacked, torch.tensor(targets, dtype=torch.long), bad)

    def name(self, index: int) -> str:
        """The file behind an item, or its index where the dataset has no files."""
        if isinstance(self.dataset, timm.data.ImageDataset):
            return str(self.dataset.filename(index, absolute=True))
        samples = getattr(self.dataset, "samples", None)
        return str(samples[index][0]) if samples else f"item {index}"

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        if isinstance(self.dataset, timm.data.ImageDataset):
            # timm's own __getitem__ would quietly put the next file in a bad one's place
            file, target = self.dataset.reader[index]
            with file:
                return Image.open(file).convert(self.mode), target
        image, target = self.dataset[index]
        return image.convert(self.mode), target


class Batches:
    """The keys of each batch of an epoch: a sampler whose order depends on (seed, epoch) alone.

    Training batches are full ones (unless there are fewer images than one batch), dealt out to the
    processes of a distributed run; validation takes every image once.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length, self.batch_size, self.training = length, batch_size, training
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        together = self.batch_size * self.world_size
        if self.training:
            return max(self.length // together, 1)
        return -(-self.length // together)

    def __iter__(self) -> Iterator[list[Key]]:
        if self.training:
            shuffle = generator(self.seed, "order", self.epoch)
            order = torch.randperm(self.length, generator=shuffle).tolist()
        else:
            order = list(range(self.length))
        for step in range(self.start, len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, position) for position in order[first : first + self.batch_size]]


class Loader:
    """A source's batches, loaded by `workers` processes (0: in this one)."""

    def __init__(
        self, source: Source, batches: Batches, workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.source, self.batches = source, batches
        self._loader: DataLoader[Any] = DataLoader(
            source,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            # the loader draws its workers' base seed here, not from the global generator
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch number `start` on."""
        self.batches.epoch, self.batches.start = epoch, start
        return iter(self._loader)


def _as_it_is(batch: Batch) -> Batch:
    return batch


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
            return cls(config, None, None, [str(digit) for digit in range(10)])
        train = open_dataset(config.data, config.dataset, config.train_split, config.download)
        validation = _open_validation(config)
        names, val_names = class_names(train), class_names(validation)
        if names and val_names and names != val_names:
            odd = ", ".join(sorted(set(names) ^ set(val_names))[:5])
            raise ValueError(f"training and validation images differ in their classes: {odd}")
        return cls(config, train, validation, names)

    def sources(self, spec: InputSpec) -> tuple[Source, Source]:
        """Training and validation images as a model with this input wants them."""
        config = self.config
        if self.train is None:
            train_digits = Digits("train", spec, augment=config.augment, seed=config.seed)
            return train_digits, Digits("validation", spec)
        mode = "L" if spec.channels == 1 else "RGB"
        positions = val_positions = None
        if self.validation is None:
            shuffle = generator(config.seed, "held out")
            order = torch.randperm(len(self.train), generator=shuffle).tolist()
            held_out = max(round(config.val_fraction * len(order)), 1)
            val_positions, positions = sorted(order[:held_out]), sorted(order[held_out:])
        validation = self.train if self.validation is None else self.validation
        return (
            ImageSource(self.train, train_transform(config, spec), mode, config.seed, positions),
            ImageSource(validation, eval_transform(spec), mode, config.seed, val_positions),
        )


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


def eval_transform(spec: InputSpec) -> Any:
    """The evaluation transform, timm's: PIL image to normalised tensor `[C, H, W]`."""
    return timm.data.create_transform(
        (spec.channels, *spec.size),
        is_training=False,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
    )


def open_dataset(data: str, dataset: str = "", split: str = "train", download: bool = False) -> Any:
    """A timm dataset of PIL images: class folders or a tar of them, `torch/...`, `hfds/...`.

    Raises:
        FileNotFoundError: if the folder, tar or named dataset is not there.
        ImportError: if `hfds/` is asked for and the `datasets` package is not installed.
        ValueError: if there are no images, or the dataset can only be streamed.
    """
    if not dataset:
        path = Path(data)
        if not path.exists():
            raise FileNotFoundError(f"data is {data!r}, which does not exist")
        if path.is_file() and path.suffix != ".tar":
            raise ValueError(f"data is the file {data!r}, expected a folder or a .tar")
    elif dataset.partition("/")[0].lower() in ("hfids", "tfds", "wds"):
        raise ValueError(f"dataset is {dataset!r}, a stream; its order cannot be resumed exactly")
    try:
        opened = timm.data.create_dataset(dataset, root=data, split=split, download=download)
    except ImportError as error:
        raise ImportError(f"{dataset!r} needs a package that is not installed: {error}") from error
    except (RuntimeError, AssertionError, OSError) as error:
        if not dataset:
            raise ValueError(f"no images in class folders in {data!r}: {error}") from error
        hint = "" if download else " (download=True fetches what can be fetched)"
        raise FileNotFoundError(
            f"cannot open {dataset!r}, split {split!r}, in {data!r}{hint}: {error}"
        ) from error
    if len(opened) == 0:
        raise ValueError(f"no images in {data!r}")
    return opened


def class_names(dataset: Any) -> list[str]:
    """Names of the classes in the order of their numbers; empty where the dataset has none."""
    reader = getattr(dataset, "reader", dataset)
    # timm's tar reader has a name of its own for it
    mapping = (
        getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    )
    return [str(name) for name in sorted(mapping, key=mapping.__getitem__)]


def _open_validation(config: TrainConfig) -> Any:
    """The validation dataset, or None where it has to be held out from the training images."""
    if config.val_data is not None:
        return open_dataset(config.val_data, "", config.val_split)
    if config.dataset:
        return open_dataset(config.data, config.dataset, config.val_split, config.download)
    names = {config.val_split, "val", "valid", "validation", "eval"}
    if any((Path(config.data) / name).is_dir() for name in names):
        return open_dataset(config.data, "", config.val_split)
    return None
