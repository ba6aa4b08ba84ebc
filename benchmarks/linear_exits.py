"""A recording of linear exits on a frozen backbone: real logits at every depth, in minutes.

    python -m benchmarks.linear_exits --weights model.safetensors --train train.tar --data test.tar \
        --size 112 --out cifar10.safetensors

Class token and mean of the patches after each layer, a linear classifier on each, and a final one on
those of all layers together, fitted to `--train` by L-BFGS with a ridge; what they say of `--data` is
recorded. These are probes, not LGViT heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from lgvit_fast.data import InputSpec
from lgvit_fast.data.sources import ImageSource, open_dataset
from lgvit_fast.data.transforms import eval_transform
from lgvit_fast.evaluation import Recording

__all__ = ["features", "fit_exits", "fit_linear"]


@torch.inference_mode()
def features(
    backbone: Any, source: Any, layers: tuple[int, ...], count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Features `[L, n, 2 C]` after each of L layers, and classes `[n]`, of images drawn at random."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:count]
    found, targets = [], []
    for chunk in order.split(128):
        batch = source.__getitems__([(0, place) for place in chunk.tolist()])
        outputs = backbone.forward_intermediates(
            batch.images,
            indices=[layer - 1 for layer in layers],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        found.append(torch.stack([torch.cat((p.mean(1), t[:, 0]), -1) for p, t in outputs]))
        targets.append(batch.targets)
    return torch.cat(found, 1), torch.cat(targets)


def fit_exits(inputs: Tensor, targets: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """A function of features `[E + 1, n, D]` to logits `[E + 1, n, K]`, the final classifier's last."""
    exits = fit_linear(inputs[:-1], targets, classes)
    final = fit_linear(_together(inputs), targets, classes)
    return lambda x: torch.cat((exits(x[:-1]), final(_together(x))))


def _together(inputs: Tensor) -> Tensor:
    return torch.cat(inputs.unbind(), -1)[None]


def fit_linear(
    inputs: Tensor, targets: Tensor, classes: int, ridge: float = 1e-2
) -> Callable[[Tensor], Tensor]:
    """A function of features `[M, n, D]` to logits `[M, n, K]` of M independent linear maps."""
    mean, spread = inputs.mean(1, keepdim=True), inputs.std(1, keepdim=True).clamp_min(1e-6)
    scaled = (inputs - mean) / spread
    weights = torch.zeros(len(inputs), inputs.shape[2] + 1, classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")
    labels = targets.repeat(len(inputs))

    def logits(x: Tensor) -> Tensor:
        return torch.baddbmm(weights[:, :1], x, weights[:, 1:])

    def closure() -> Tensor:
        optimiser.zero_grad()
        entropy = F.cross_entropy(logits(scaled).flatten(0, 1), labels, reduction="sum")
        loss = entropy / len(targets) + ridge * (weights[:, 1:] ** 2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return lambda x: logits((x - mean) / spread).detach()


def main() -> None:
    """Fit, record, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm name of a ViT")
    parser.add_argument("--weights", required=True, help="its file")
    parser.add_argument("--size", type=int, default=112, help="pixels of an image")
    parser.add_argument("--layers", type=int, nargs="+", default=[*range(4, 13)])
    parser.add_argument("--train", required=True, help="folder or tar of class folders")
    parser.add_argument("--data", required=True, help="likewise, recorded")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    backbone = timm.create_model(
        args.model,
        pretrained=True,
        pretrained_cfg_overlay={"file": args.weights},
        img_size=args.size,
    ).eval()
    spec = InputSpec.of(backbone)
    layers = tuple(args.layers)
    sources = [
        ImageSource(open_dataset(path, "", "", False), eval_transform(spec), "RGB")
        for path in (args.train, args.data)
    ]
    inputs, targets = features(backbone, sources[0], layers, args.train_images, seed=0)
    classify = fit_exits(inputs, targets, len(sources[0].class_names))
    inputs, targets = features(backbone, sources[1], layers, args.images, seed=1)
    recording = Recording(classify(inputs), targets, layers)
    recording.save(args.out)
    shown = ", ".join(f"{100 * accuracy:.1f}" for accuracy in recording.accuracies)
    print(f"{len(recording)} images in {args.out}; % right after each layer: {shown}")


if __name__ == "__main__":
    main()
