"""A frozen backbone's tokens on disk, computed once for all epochs.

A folder: `rows.bin`, a row of bytes for each image (and its mirror image), memory-mapped when read; the
CRC-32 of each row in `sums.npy`; and `cache.json`, written last, which says what the rows were made of.
Tokens are float16, the model's own logits float32.
"""

from __future__ import annotations

import hashlib
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lgvit_fast.checkpoints.files import load_json, save_json
from lgvit_fast.checkpoints.fingerprint import fingerprint as fingerprint_of
from lgvit_fast.data.batches import BadImage, Batch, Batches, Key, Loader, Source
from lgvit_fast.data.seeds import derive_seed
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.model import LGViT
from lgvit_fast.training.checkpoint import differences
from lgvit_fast.training.fingerprint import fingerprint
from lgvit_fast.training.tokens import Tokens, run_backbone
from lgvit_fast.training.validation import take_bad

__all__ = ["CachedTokens", "cache_facts", "cached", "row_bytes"]

logger = logging.getLogger(__name__)

FORMAT = "lgvit-fast token cache 1"
_PROBES = 4  # images whose pixels are compared, beside names and sizes of all


class CachedTokens:
    """A source of `Tokens` in place of images; every target is -1.

    Args:
        folder: with a whole cache, as `cached` leaves it.
        source: where the images came from.
        seed: of the choice between an image and its mirror image, anew in every epoch.
    """

    def __init__(self, folder: Path, source: Source, seed: int = 0) -> None:
        found = load_json(folder / "cache.json")
        self.folder, self.source, self.seed = folder, source, seed
        self.class_names: list[str] = []
        self.shapes = [tuple(shape) for shape in found["shapes"]]
        self.last, self.classes = bool(found["facts"]["last tokens"]), int(found["classes"])
        self.image_size = cast(tuple[int, int], tuple(found["image size"]))
        self.variants, self.rows = int(found["facts"]["variants"]), int(found["rows"])
        self.bad = [BadImage(*entry) for entry in found["bad"]]
        self._width = _row_width(self.shapes, self.classes)
        self._sums = np.load(folder / "sums.npy", allow_pickle=False)
        self._map = np.memmap(folder / "rows.bin", np.uint8, "r", shape=(self.rows, self._width))

    @property
    def dataset(self) -> Any:
        """The data set behind the source, None if it has none."""
        return getattr(self.source, "dataset", None)

    @property
    def num_bytes(self) -> int:
        """What the rows take on disk."""
        return self.rows * self._width

    def __len__(self) -> int:
        return self.rows // self.variants

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        rows = [self._row(epoch, position) for epoch, position in keys]
        data = np.stack([self._map[row] for row in rows])
        for row, found in zip(rows, data, strict=True):
            if zlib.crc32(found) != self._sums[row]:
                raise ValueError(
                    f"{self.folder} is damaged: row {row} does not match its checksum; remove the"
                    " folder, and the tokens are computed again"
                )
        targets = torch.full((len(rows),), -1, dtype=torch.long)
        return Batch(cast(Tensor, self._tokens(torch.from_numpy(data))), targets, [])

    def _row(self, epoch: int, position: int) -> int:
        if self.variants == 1:
            return position
        mirror = derive_seed(self.seed, "mirror", epoch, position) % self.variants
        return position * self.variants + mirror

    def _tokens(self, data: Tensor) -> Tokens:
        """Rows of bytes `[b, width]` as tokens."""
        logits = data[:, self._width - 4 * self.classes :].contiguous().view(torch.float32)
        halves = data[:, : self._width - 4 * self.classes].contiguous().view(torch.float16)
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = [
            part.unflatten(1, shape)
            for part, shape in zip(halves.split(sizes, dim=1), self.shapes, strict=True)
        ]
        last = parts.pop() if self.last else None
        return Tokens(tuple(parts), last, logits, self.image_size)


def cached(
    folder: Path,
    model: LGViT,
    source: Source,
    *,
    limit: int,
    last: bool,
    mirror: bool,
    beside: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    autocast: AbstractContextManager[Any] | None = None,
    bad: list[BadImage] | None = None,
    progress: bool = False,
) -> CachedTokens:
    """The tokens of all images of a source: those in a folder if they are whole, or made there now.

    Args:
        folder: the cache's.
        model: in eval mode.
        source: images, the same in every epoch.
        limit: most bytes that the cache may have.
        last: keep the last block's patch tokens, too.
        mirror: keep every image's mirror image, too.
        beside: rows of another cache that `limit` must have room for, too.
        seed: of the choice between the two.
        batch_size: images at a time.
        workers: processes that load images.
        autocast: to compute the tokens under.
        bad: unreadable images are added here and left out; None: the first one raises.
        progress: show a bar, if standard error is a terminal.

    Raises:
        ValueError: `limit` is too small, naming what is needed; the cache is of other weights,
            transforms, images or exits, naming what differs; or tokens beyond float16's range.
        BadImageError: at an unreadable image, if `bad` is None; or if none can be read.
    """
    facts = cache_facts(model, source, last, mirror)
    if _is_whole(folder):
        found = differences(load_json(folder / "cache.json")["facts"], facts)
        if found:
            raise ValueError(
                f"{folder} is a cache of something else: {'; '.join(found)}; remove the folder, or"
                " name another one"
            )
        return CachedTokens(folder, source, seed)
    _build(
        folder, model, source, facts, limit, beside, batch_size, workers, autocast, bad, progress
    )
    return CachedTokens(folder, source, seed)


def cache_facts(model: LGViT, source: Source, last: bool, mirror: bool) -> dict[str, Any]:
    """What the rows of a cache depend on."""
    spec = InputSpec.of(model.backbone)
    places = getattr(source, "positions", range(len(source)))
    return {
        "backbone": fingerprint_of(model.backbone.state_dict()),
        "type": str(model.compute_dtype),
        "exits": [f"{spec.head} after block {spec.layer}" for spec in model.exits],
        "pool": model.pool,
        "last tokens": last,
        "variants": 1 + mirror,
        "transform": str(spec),
        "images": len(source),
        "images in": fingerprint(source),
        "chosen": _digest(np.asarray(places, dtype=np.int64)),
        "pixels": _probe(source),
    }


def row_bytes(tokens: Tokens) -> int:
    """Bytes that one image takes."""
    return _row_width([tuple(part.shape[1:]) for part in _parts(tokens)], tokens.final.shape[1])


def _row_width(shapes: Sequence[Sequence[int]], classes: int) -> int:
    return 2 * sum(math.prod(shape) for shape in shapes) + 4 * classes


def _parts(tokens: Tokens) -> list[Tensor]:
    return [*tokens.exits, *([] if tokens.last is None else [tokens.last])]


def _is_whole(folder: Path) -> bool:
    """Whether a build came to its end; what is left of one that did not is made anew."""
    try:
        said = load_json(folder / "cache.json")
        whole = said["format"] == FORMAT
        width = _row_width(said["shapes"], said["classes"])
        whole &= (folder / "rows.bin").stat().st_size == said["rows"] * width
        whole &= len(np.load(folder / "sums.npy", allow_pickle=False)) == said["rows"]
    except FileNotFoundError:
        return False
    except (ValueError, TypeError, KeyError, OSError) as error:
        logger.warning("%s is no whole token cache (%s); it is made anew", folder, error)
        return False
    if not whole:
        logger.warning("%s is not a whole token cache; it is made anew", folder)
    return bool(whole)


def _build(
    folder: Path,
    model: LGViT,
    source: Source,
    facts: dict[str, Any],
    limit: int,
    beside: int,
    batch_size: int,
    workers: int,
    autocast: AbstractContextManager[Any] | None,
    bad: list[BadImage] | None,
    progress: bool,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cache.json").unlink(missing_ok=True)
    loader = Loader(source, Batches(len(source), batch_size, training=False), workers)
    shapes: list[tuple[int, ...]] = []
    classes, size, sums, unreadable = 0, (0, 0), list[int](), list[BadImage]()
    with (folder / "rows.bin").open("wb") as file:
        # disable=None: only on a terminal
        hidden = None if progress else True
        for batch in tqdm(loader.epoch(), f"{folder.name} tokens", len(loader), disable=hidden):
            unreadable += batch.bad
            take_bad(batch, bad)
            if not len(batch.images):
                continue
            variants = [batch.images, batch.images.flip(-1)][: facts["variants"]]
            made = [
                _tokens_of(model, images, facts["last tokens"], autocast) for images in variants
            ]
            if not shapes:
                shapes = [tuple(part.shape[1:]) for part in _parts(made[0])]
                classes, size = made[0].final.shape[1], made[0].image_size
                _require_room(limit, row_bytes(made[0]), len(source) * len(variants) + beside)
            for row in _rows(made):
                file.write(row)
                sums.append(zlib.crc32(row))
    if not sums:
        raise ValueError(f"none of the images can be read; the first: {unreadable[0]}")
    np.save(folder / "sums.npy", np.array(sums, dtype=np.uint32))
    about = {
        "format": FORMAT,
        "facts": facts,
        "shapes": shapes,
        "classes": classes,
        "image size": size,
        "rows": len(sums),
        "bad": [list(image) for image in unreadable],
    }
    save_json(folder / "cache.json", about)


def _tokens_of(
    model: LGViT, images: Tensor, last: bool, autocast: AbstractContextManager[Any] | None
) -> Tokens:
    device = next(model.parameters()).device
    with autocast or nullcontext():
        return run_backbone(model, images.to(device), last)


def _rows(variants: list[Tokens]) -> Iterator[bytes]:
    """Bytes of every image, one variant after the other."""
    encoded = []
    for tokens in variants:
        halves = torch.cat([part.flatten(1).half() for part in _parts(tokens)], dim=1)
        if not halves.isfinite().all():
            raise ValueError(
                "tokens beyond the range of float16 (65504), in which the cache keeps them: train"
                " without a cache"
            )
        encoded.append((halves.cpu().numpy(), tokens.final.float().cpu().numpy()))
    for place in range(len(variants[0])):
        for halves_of, logits_of in encoded:
            yield halves_of[place].tobytes() + logits_of[place].tobytes()


def _require_room(limit: int, width: int, rows: int) -> None:
    if width * rows > limit:
        raise ValueError(
            f"cache is {limit} bytes, but the tokens of all images (and mirror images) take {rows} rows"
            f" of {width} bytes, {width * rows} in all: allow so much, take fewer images, or no cache"
        )


def _probe(source: Source) -> str:
    """The pixels of a few images, as the transforms give them."""
    last = len(source) - 1
    places = sorted({round(last * part / (_PROBES - 1)) for part in range(_PROBES)})
    batch = source.__getitems__([(0, place) for place in places])
    return _digest(batch.images.numpy())


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
