"""Exported models that tests share; an export takes seconds."""

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock  # torch brings it

import lgvit_fast
from tests.conftest import SHARED
from tests.helpers import randomize, tiny_model

HEADS = ("lph_full", "lph_light", "gah_2", "gah_3")


@cache
def model() -> lgvit_fast.LGViT:
    """Five blocks of a tiny ViT with an exit of each of the paper's heads."""
    made = tiny_model(exits=[1, 2, 3, 4], heads=HEADS, depth=5, embed_dim=128)
    with torch.no_grad():  # else logits are so large that every score is 0 or 1
        for name, weight in made.named_parameters():
            weight.mul_(0.15 if "classifiers" in name or name.startswith("backbone.head.") else 1)
    made.class_names = [f"class {number}" for number in range(7)]
    made.policy = lgvit_fast.Entropy(0.7)
    return made


@cache
def folder() -> Path:
    """`model` exported."""
    return _shared("vit", model)


@cache
def swin() -> lgvit_fast.LGViT:
    """Three blocks of a tiny Swin in two stages, with a local and a global head."""
    size = {"img_size": 48, "patch_size": 4, "window_size": 3, "embed_dim": 16, "num_classes": 7}
    stages = {"depths": (2, 1), "num_heads": (1, 2)}
    torch.manual_seed(0)  # every process makes the same model
    made = lgvit_fast.create_model(
        "swin_tiny_patch4_window7_224", exits=[1, 2], heads=["lph_full", "gah_1"], **size, **stages
    )
    randomize(made)
    return made.eval()


@cache
def swin_folder() -> Path:
    """`swin` exported."""
    return _shared("swin", swin)


def _shared(name: str, make: Callable[[], lgvit_fast.LGViT]) -> Path:
    """An export that the processes of one test run make once."""
    root = Path(os.environ[SHARED]) if SHARED in os.environ else _temporary()
    with FileLock(root / f"{name}.lock"):
        made = root / name
        return made if made.exists() else lgvit_fast.export(make(), made)


@cache
def _temporary() -> Path:
    made = tempfile.TemporaryDirectory(prefix="lgvit-fast-exports-")
    _kept.append(made)  # deleted with the process
    return Path(made.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []
