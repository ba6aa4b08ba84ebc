"""Where images come from: any map-style timm dataset, decoded and transformed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor

from lgvit_fast.data.batches import BadImage, Batch, Key
from lgvit_fast.data.images import check_file, open_image, upright
from lgvit_fast.data.seeds import seeded
from lgvit_fast.data.suffixes import timm_reads_all

__all__ = ["ImageSource", "class_names", "open_dataset"]

# Names of sub-folders that are parts of a data set; timm takes those in a row for the same.
_SPLITS = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
    ("test",),
    ("testing",),
)


class ImageSource:
    """Images of a map-style dataset, decoded and transformed.

    Args:
        dataset: a timm `ImageDataset`, or a torchvision-like one of (image, class) items. An item
            that raises any exception is a bad image.
        transform: PIL image to tensor `[C, H, W]`.
        mode: PIL mode to convert to, `RGB` or `L`.
        seed: of the transform's randomness.
        positions: which items of the dataset, in order; None: all.
        labelled: False never looks at classes, gives -1 for each, and takes data sets of images alone,
            PIL ones or tensors `[C, H, W]`, which are not transformed.
        smallest: height and width in pixels that an image must have.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Image.Image], Tensor],
        mode: str = "RGB",
        seed: int = 0,
        positions: Sequence[int] | None = None,
        labelled: bool = True,
        smallest: tuple[int, int] = (1, 1),
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.mode = mode
        self.seed = seed
        self.positions = range(len(dataset)) if positions is None else positions
        self.labelled, self.smallest = labelled, smallest
        self.class_names = class_names(dataset) if labelled else []

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        images, targets, bad = [], [], []
        for epoch, position in keys:
            index = self.positions[position]
            with seeded(self.seed, "sample", epoch, position):
                try:
                    image, target = self._read(index)
                    images.append(image if isinstance(image, Tensor) else self.transform(image))
                    targets.append(int(target) if self.labelled else -1)
                except Exception as error:  # decoders raise anything
                    bad.append(BadImage(self.name(index), f"{type(error).__name__}: {error}"))
        stacked = torch.stack(images) if images else torch.empty(0)
        return Batch(stacked, torch.tensor(targets, dtype=torch.long), bad)

    def name(self, index: int) -> str:
        """The file behind an item, or its index where the dataset has no files."""
        if isinstance(self.dataset, timm.data.ImageDataset):
            return str(self.dataset.filename(index, absolute=True))
        samples = getattr(self.dataset, "samples", None)
        return str(samples[index][0]) if samples else f"item {index}"

    def _read(self, index: int) -> tuple[Image.Image | Tensor, Any]:
        image, target = self._open(index)
        height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
        if height < self.smallest[0] or width < self.smallest[1]:
            raise ValueError(
                f"{height} x {width} pixels, expected at least {self.smallest[0]} x {self.smallest[1]},"
                " one patch of the model"
            )
        return image, target

    def _open(self, index: int) -> tuple[Image.Image | Tensor, Any]:
        if isinstance(self.dataset, timm.data.ImageDataset):
            # timm's own __getitem__ would quietly put the next file in a bad one's place
            reader = self.dataset.reader
            if isinstance(reader, ReaderImageFolder):
                check_file(self.name(index))  # before the reader opens it
            file, target = reader[index]
            if file is None:
                raise ValueError("not a file in the tar, expected an image file")
            with file:
                return open_image(file, self.mode), target
        item = self.dataset[index]
        if not self.labelled:
            item = (item[0] if isinstance(item, tuple | list) else item, -1)
        image, target = item
        if isinstance(image, Tensor) and not self.labelled:
            return image, target
        return upright(image, self.mode), target


def open_dataset(data: str, dataset: str = "", split: str = "train", download: bool = False) -> Any:
    """A timm dataset of PIL images: class folders or a tar of them, `torch/...`, `hfds/...`.

    Raises:
        FileNotFoundError: if the folder, tar or named dataset is not there.
        ImportError: if `hfds/` is asked for and the `datasets` package is not installed.
        ValueError: if there are no images, the folder holds splits but not this one, or the dataset
            can only be streamed.
    """
    if not dataset:
        path = Path(data)
        if not path.exists():
            raise FileNotFoundError(f"data is {data!r}, which does not exist")
        if path.is_file() and path.suffix != ".tar":
            raise ValueError(f"data is the file {data!r}, expected a folder or a .tar")
        _refuse_other_splits(path, split)
    elif dataset.partition("/")[0].lower() in ("hfids", "tfds", "wds"):
        raise ValueError(f"dataset is {dataset!r}, a stream; its order cannot be resumed exactly")
    try:
        with timm_reads_all():
            opened = timm.data.create_dataset(dataset, root=data, split=split, download=download)
    except ImportError as error:
        raise ImportError(f"{dataset!r} needs a package that is not installed: {error}") from error
    except (RuntimeError, AssertionError, OSError) as error:
        if not dataset:
            raise ValueError(f"no images in {data!r}: {error}") from error
        hint = "" if download else " (download=True fetches what can be fetched)"
        raise FileNotFoundError(
            f"cannot open {dataset!r}, split {split!r}, in {data!r}{hint}: {error}"
        ) from error
    if hasattr(opened, "loader"):
        opened.loader = open_image  # torchvision's folders, too, read files as everything here does
    if len(opened) == 0:
        raise ValueError(f"no images in {data!r}")
    return opened


def _refuse_other_splits(folder: Path, split: str) -> None:
    """Refuse a folder that is all splits, none of them the one asked for: they would be mixed.

    A folder with any other sub-folder is one of classes, whatever these are called.
    """
    if not folder.is_dir():
        return
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    asked = next((names for names in _SPLITS if split in names), (split,))
    known = {name for names in _SPLITS for name in names}
    if found and known.issuperset(found) and not set(asked).intersection(found):
        raise ValueError(
            f"{str(folder)!r} holds {' and '.join(f'{name}/' for name in found)}, and none of these is"
            f" the split {split!r}: name one as the split, or the folder itself as data"
        )


def class_names(dataset: Any) -> list[str]:
    """Names of the classes in the order of their numbers; empty where the dataset has none."""
    reader = getattr(dataset, "reader", dataset)
    # timm's tar reader has a name of its own for it
    mapping = (
        getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    )
    return [str(name) for name in sorted(mapping, key=mapping.__getitem__)]
