"""What comes before the first update of a run without labels: checks, warm start, token cache."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgvit_fast.data.batches import BadImage, Batches, Loader, Source
from lgvit_fast.data.part import Part
from lgvit_fast.data.seeds import generator
from lgvit_fast.model import LGViT
from lgvit_fast.training.checkpoint import Checkpoint
from lgvit_fast.training.config import DistillConfig
from lgvit_fast.training.process import Process
from lgvit_fast.training.token_cache import CachedTokens, cached
from lgvit_fast.training.tokens import Tokens, run_backbone
from lgvit_fast.training.validation import take_bad
from lgvit_fast.training.warm_start import warm_start

__all__ = [
    "FEWEST_IMAGES",
    "begin",
    "patch_size",
    "remove_cache",
    "require_enough_images",
    "split_held_out",
]

logger = logging.getLogger("lgvit_fast")

FEWEST_IMAGES = 50


def begin(
    config: DistillConfig,
    model: LGViT,
    sources: tuple[Source, Source],
    process: Process,
    checkpoint: Path,
) -> tuple[Source, Source]:
    """Prepare the model's exits and the images of a run.

    Args:
        config: of the run.
        model: whose exits are to be taught; those never trained are warm-started.
        sources: training and held-out images.
        process: this one.
        checkpoint: of the run, where it goes on from.

    Returns:
        What to train on and validate on: the images, or their tokens from the cache.

    Raises:
        ValueError: a cache in several processes, or what `cached` and `warm_start` raise.
        BadImageError: at an unreadable image, unless they are skipped.
    """
    if not _seems_trained(model):
        logger.warning(
            "the model's own classifier seems untrained (its bias is zero): exits will agree with it,"
            " but how right it is nobody knows"
        )
    model.freeze_backbone()
    model.eval()
    resumed = config.resume and checkpoint.exists()
    if config.cache is not None and not (resumed and _is_finished(config, checkpoint)):
        if process.distributed:
            raise ValueError("cache is set, but several processes train: a cache is of one process")
        sources = _cached(config, model, sources, process.device)
    if config.warm_start and not resumed:
        warm_start(model, _batches(config, model, sources[0], process.device))
    return sources


def require_enough_images(training: Source, held_out: Source) -> None:
    """Raise ValueError for fewer than `FEWEST_IMAGES` in all."""
    total = len(training) + len(held_out)
    if total < FEWEST_IMAGES:
        raise ValueError(
            f"images are {total} in all, the held-out ones included, expected at least"
            f" {FEWEST_IMAGES}; exits learn from thousands"
        )


def split_held_out(config: DistillConfig, held_out: Source) -> tuple[Source, Source | None]:
    """The held-out images to choose the best epoch on; if it is asked for, others to calibrate on.

    A certificate needs images that no choice was made on.
    """
    if config.min_agreement is None:
        return held_out, None
    order = torch.randperm(len(held_out), generator=generator(config.seed, "calibrate")).tolist()
    third = len(order) // 3
    return Part(held_out, sorted(order[:third])), Part(held_out, sorted(order[third:]))


def patch_size(model: LGViT) -> tuple[int, int]:
    """Height and width in pixels of the patch that becomes one token."""
    embed: Any = model.backbone.patch_embed
    found = next(module for module in embed.modules() if isinstance(module, nn.Conv2d))
    return int(found.kernel_size[0]), int(found.kernel_size[1])


def remove_cache(config: DistillConfig) -> None:
    """Remove the token cache, unless its folder was named to keep it."""
    if config.cache_folder is None:
        shutil.rmtree(_cache_folder(config), ignore_errors=True)


def _cache_folder(config: DistillConfig) -> Path:
    return Path(config.cache_folder or Path(config.output) / "tokens")


def _cached(
    config: DistillConfig, model: LGViT, sources: tuple[Source, Source], device: torch.device
) -> tuple[Source, Source]:
    assert config.cache is not None
    model.to(device)
    kinds = {spec.kind for spec in model.exits} - {"plain"}
    mirror = config.augment and config.hflip > 0
    parts: list[CachedTokens] = []
    left = config.cache
    for name, source, beside in (
        ("training", sources[0], len(sources[1])),
        ("held-out", sources[1], 0),
    ):
        bad: list[BadImage] | None = [] if config.skip_bad_images else None
        part = cached(
            _cache_folder(config) / name,
            model,
            source,
            limit=left,
            last=bool(kinds) and config.stage2.beta > 0,
            mirror=mirror and name == "training",
            beside=beside,
            seed=config.seed,
            batch_size=config.val_batch_size or config.batch_size,
            workers=config.workers,
            autocast=_autocast(config, device),
            bad=bad,
            progress=config.progress,
        )
        left -= part.num_bytes
        parts.append(part)
    return parts[0], parts[1]


def _batches(
    config: DistillConfig, model: LGViT, source: Source, device: torch.device
) -> Iterator[Tokens]:
    """Tokens of as many images as the warm start takes."""
    workers = 0 if isinstance(source, CachedTokens) else config.workers
    order = Batches(len(source), config.batch_size, training=True, seed=config.seed)
    loader, seen = Loader(source, order, workers), 0
    bad: list[BadImage] | None = [] if config.skip_bad_images else None
    for batch in loader.epoch():
        take_bad(batch, bad)
        if not len(batch.images):
            continue
        images: Tensor | Tokens = batch.images.to(device)
        if isinstance(images, Tensor):
            with _autocast(config, device):
                images = run_backbone(model, images, last=False)
        yield images
        seen += len(images)
        if seen >= config.warm_start_images:
            return


def _autocast(config: DistillConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def _is_finished(config: DistillConfig, checkpoint: Path) -> bool:
    progress = Checkpoint.load(checkpoint).state.get("progress")
    return isinstance(progress, dict) and progress.get("epoch", 0) >= config.stage2.epochs


def _seems_trained(model: LGViT) -> bool:
    """Whether a bias of the classifier differs from the zeros it began with, if it has one."""
    classifier: Any = model.backbone.get_classifier()
    layers = classifier if isinstance(classifier, tuple | list) else (classifier,)
    biases = [
        module.bias
        for layer in layers
        for module in layer.modules()
        if isinstance(module, nn.Linear) and module.bias is not None
    ]
    return not biases or any(bool(bias.any()) for bias in biases)
