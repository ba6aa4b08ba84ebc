"""Small models and golden numbers the tests share."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lgvit_fast

GOLDEN = Path(__file__).parent / "golden"


def tiny_vit(name: str = "vit_tiny_patch16_224", seed: int = 0, **kwargs: Any) -> nn.Module:
    """A timm model small enough for any test: 32 px, 8 px patches, width 32, 6 blocks."""
    torch.manual_seed(seed)
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 7,
    }
    return timm.create_model(name, **{**options, **kwargs})


def tiny_model(
    name: str = "vit_tiny_patch16_224", seed: int = 0, exits: Any = None, **kwargs: Any
) -> lgvit_fast.LGViT:
    """A tiny LGViT in eval mode with random weights, BatchNorm statistics and clear-cut answers."""
    model_options = {k: kwargs.pop(k) for k in ("heads", "pool", "num_heads") if k in kwargs}
    model = lgvit_fast.LGViT(tiny_vit(name, seed, **kwargs), exits, **model_options)
    randomize(model, seed)
    return model.eval()


def tiny_swin(
    name: str = "swin_tiny_patch4_window7_224", seed: int = 0, exits: Any = None, **kwargs: Any
) -> lgvit_fast.LGViT:
    """A tiny LGViT on a Swin in eval mode: 48 px, width 16 to 128, 2 + 2 + 6 + 2 blocks."""
    torch.manual_seed(seed)
    model_options = {k: kwargs.pop(k) for k in ("heads", "pool", "num_heads") if k in kwargs}
    options = {
        "img_size": 48,
        "patch_size": 4,
        "window_size": 3,
        "embed_dim": 16,
        "depths": (2, 2, 6, 2),
        "num_heads": (1, 2, 4, 8),
        "num_classes": 7,
    }
    backbone = timm.create_model(name, **{**options, **kwargs})
    model = lgvit_fast.LGViT(backbone, exits, **model_options)
    randomize(model, seed)
    return model.eval()


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Make every weight, bias and BatchNorm statistic matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if "classifiers" in name else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)


def images(
    batch: int, size: tuple[int, int] = (32, 32), channels: int = 3, seed: int = 1
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator)


@cache
def golden(kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts (json) and arrays of a golden model: "vit", "deit" or "swin"."""
    facts = json.loads((GOLDEN / f"{kind}_golden.json").read_text())
    with np.load(GOLDEN / f"{kind}_golden.npz") as arrays:
        return facts, dict(arrays)


def golden_model(kind: str) -> lgvit_fast.LGViT:
    return copy.deepcopy(_golden_model(kind))


@cache
def _golden_model(kind: str) -> lgvit_fast.LGViT:
    weights = load_file(GOLDEN / f"{kind}_weights_fp16.safetensors")
    return lgvit_fast.load_published(weights, golden(kind)[0]["config"])


def golden_policy(entry: dict[str, Any]) -> lgvit_fast.Policy:
    """The policy of one entry of a golden json's `strategies`."""
    threshold = entry["threshold"]
    match entry["strategy"]:
        case "confidence":
            return lgvit_fast.Confidence(threshold)
        case "entropy":
            return lgvit_fast.Entropy(threshold)
        case "patience":
            return lgvit_fast.Patience(threshold[0])
    *thresholds, patience = threshold
    assert len(set(thresholds)) == 1  # Swin has one for each exit of a stage
    return lgvit_fast.PatientConfident(thresholds[0], patience)
