r"""Every recipe on a pretrained ViT-Ti/16, at equal training compute, as one resumable run.

    python -m benchmarks.recipes_real --data ../shared/data --weights vit_tiny/model.safetensors \
        --out benchmarks/results/recipes_real.json --runs runs/recipes_real
    python -m benchmarks.recipes_report --results benchmarks/results/recipes_real.json \
        --runs runs/recipes_real --time --figure docs/images/recipes_real.png

`--data` holds `cifar10/{train,test}.tar` and `tiny_imagenet/{train,val}.tar`, tars of class folders,
and `tiny_imagenet/classes.json`. Stage 0 adapts the backbone and its classifier to a data set, once.
Every recipe starts from there, its exits begin as `warm_start` says, and it has the same number of
multiply-adds for forward and backward passes, of which cheap steps (a frozen backbone) get more images.
A method of two stages spends a third on the second. Seeds change the heads, the training images and
their order, and the test images. Every run that ends is written to `--out` at once, and not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lgvit_fast
from lgvit_fast.data.batches import Batch, Batches, Key, Loader
from lgvit_fast.data.images import open_image
from lgvit_fast.data.seeds import derive_seed, generator, seed_all
from lgvit_fast.data.sources import open_dataset
from lgvit_fast.evaluation import Recording, record
from lgvit_fast.heads.gah import GlobalAggregationHead
from lgvit_fast.heads.lph import LocalPerceptionHead
from lgvit_fast.heads.plain import BlockHead
from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig
from lgvit_fast.training.loop import train_stage
from lgvit_fast.training.process import Process
from lgvit_fast.training.recipes import RECIPES
from lgvit_fast.training.stages import Stage1, Stage2

MODEL = "vit_tiny_patch16_224"
SETS = {"cifar10": "test.tar", "tiny_imagenet": "val.tar"}
POOL, HELD_OUT = 24_000, 2_000  # training images that are decoded, and those of them to tune on


@dataclass(frozen=True)
class Images:
    """Decoded images as a training source: uint8 `[n, 3, S, S]`, mirrored at random in training.

    Attributes:
        pixels: the images.
        targets: `[n]` int64 classes.
        class_names: in the order of the classes.
        seed: of the mirroring; None: no mirroring.
    """

    pixels: np.ndarray
    targets: Tensor
    class_names: list[str]
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        chosen = [position for _, position in keys]
        images = (
            torch.from_numpy(self.pixels[chosen]).float().div_(127.5).sub_(1)
        )  # mean = std = 0.5
        if self.seed is not None:
            drawn = [derive_seed(self.seed, "mirror", *key) & 1 for key in keys]
            mirrored = torch.tensor(drawn, dtype=torch.bool)
            images[mirrored] = images[mirrored].flip(-1)
        return Batch(images, self.targets[chosen], [])

    def name(self, index: int) -> str:
        """What the fingerprint of a run knows an image by."""
        return f"image {index}"

    def part(self, places: Tensor, seed: int | None) -> Images:
        """Some of the images, in this order."""
        return Images(self.pixels[places.numpy()], self.targets[places], self.class_names, seed)


@cache
def decode(tar: Path, size: int, count: int, cache: Path) -> Images:
    """`count` images of a tar of class folders, chosen at random, resized once; kept in a cache."""
    dataset = open_dataset(str(tar))
    order = torch.randperm(len(dataset), generator=generator("decode", tar.name)).tolist()[:count]
    reader = dataset.reader
    file = cache / f"{tar.parent.name}-{tar.stem}-{size}-{len(order)}.npz"
    if not file.exists():
        pixels = np.empty((len(order), 3, size, size), np.uint8)
        targets = np.empty(len(order), np.int64)
        for place, index in enumerate(order):
            handle, targets[place] = reader[index]
            with handle:
                image = open_image(handle, "RGB").resize((size, size), 3)  # 3: bicubic
            pixels[place] = np.asarray(image).transpose(2, 0, 1)
        np.savez(file, pixels=pixels, targets=targets)
    stored = np.load(file)
    names = sorted(reader.class_name_to_idx, key=reader.class_name_to_idx.__getitem__)
    return Images(stored["pixels"], torch.from_numpy(stored["targets"]), names)


# ---------------------------------------------------------------------------- training compute


def training_cost(objective: nn.Module, size: int) -> float:
    """Multiply-adds of one image's forward and backward pass, the mean of an even and an odd update."""
    images, targets = torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.long)
    total = 0
    for update in (0, 1):
        with FlopCounterMode(display=False) as counter:
            objective(images, targets, update)[0].backward()
        total += counter.get_total_flops()
        objective.zero_grad()
    return total / 2 / 2 / len(images)  # two updates; a multiply-add is two operations


def dense_cost(backbone: nn.Module, size: int) -> float:
    """Multiply-adds of one image's forward and backward pass through the backbone alone."""
    images = torch.zeros(2, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        backbone(images).sum().backward()
    backbone.zero_grad()
    return counter.get_total_flops() / 2 / len(images)


# ---------------------------------------------------------------------------- the start of all recipes


@torch.no_grad()
def warm_start(model: lgvit_fast.LGViT, images: Images) -> None:
    """Begin every exit with the backbone's own classifier, moved to the exit's block.

    Heads begin by transforming nothing, as far as their form allows; classifiers are the map of least
    squares (with a ridge) from what they read to the final logits. Training this short teaches heads
    that begin with noise next to nothing, under any recipe.
    """
    for head in model.exit_heads:
        plain_start(head.perception)
    read: dict[int, list[Tensor]] = {place: [] for place in range(len(model.exits))}
    hooks = [
        head.classifiers[0].register_forward_pre_hook(
            lambda _, inputs, place=place: read[place].append(inputs[0].double())
        )
        for place, head in enumerate(model.exit_heads)
    ]
    model.eval()
    final = torch.cat([model.forward_exits(b.images).final.double() for b in in_order(images)])
    for hook in hooks:
        hook.remove()
    for place, head in enumerate(model.exit_heads):
        weight, bias = least_squares(torch.cat(read[place]), final)
        head.classifiers[0].weight.copy_(weight)
        head.classifiers[0].bias.copy_(bias)


def least_squares(vectors: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weight `[K, D]` and bias `[K]` from vectors `[n, D]` to `[n, K]`, with a ridge of 1 %."""
    mean, centred = vectors.mean(0), vectors - vectors.mean(0)
    moments = centred.T @ centred
    moments.diagonal().add_(0.01 * moments.diagonal().mean())
    weight = torch.linalg.solve(moments, centred.T @ (wanted - wanted.mean(0))).T
    return weight, wanted.mean(0) - weight @ mean


def plain_start(perception: nn.Module) -> None:
    """Local heads and blocks begin as the identity, global heads as means that attention weighs."""
    if isinstance(perception, LocalPerceptionHead):
        nn.init.zeros_(perception.norm2.weight)
    elif isinstance(perception, GlobalAggregationHead):
        with torch.no_grad():
            nn.init.eye_(perception.qkv.weight[2 * perception.proj.in_features :])
        nn.init.eye_(perception.proj.weight)
    elif isinstance(perception, BlockHead):
        for name in ("attn.proj", "mlp.fc2"):
            for parameter in perception.block.get_submodule(name).parameters():
                nn.init.zeros_(parameter)


# ---------------------------------------------------------------------------- one training


@dataclass(frozen=True)
class Training:
    """A recipe's training, or a variant of it that an ablation compares.

    Attributes:
        recipe: a key of `RECIPES`.
        alpha: of the first stage.
        exits: block numbers; None: the default.
        strategy: of stage 1, if not the recipe's.
        second: share of the compute that goes into stage 2 of a method with two.
        lr: peak learning rate.
        warm: begin as `warm_start` does; otherwise with noise.
    """

    recipe: str
    alpha: float = 0.3
    exits: tuple[int, ...] | None = None
    heads: str | tuple[str, ...] | None = None
    strategy: str | None = None
    second: float = 1 / 3
    lr: float = 3e-4
    warm: bool = True


TRAININGS = {
    "lgvit": Training("lgvit"),
    "lgvit_joint": Training("lgvit_joint"),
    "sdn": Training("sdn"),
    "pabee": Training("pabee"),  # and pcee, which differs only in when an image leaves
    "vit_ee": Training("vit_ee"),
    "berxit": Training("berxit"),
    "dense": Training("dense"),  # the backbone alone
}
MAIN = tuple(TRAININGS)
LOCAL_LINEAR = ("lph_full",) * 2 + ("lph_light",) * 2 + ("linear",) * 4
TRAININGS |= {
    "self_distillation_local_linear": Training(
        "lgvit_joint", strategy="self_distillation", heads=LOCAL_LINEAR
    ),
    "lgvit_cold": Training("lgvit", warm=False),
    "self_distillation": Training("lgvit_joint", strategy="self_distillation"),
    "labels_only": Training("lgvit_joint", strategy="self_distillation", alpha=0.0),
}


def train_recipe(
    training: Training,
    model: lgvit_fast.LGViT,
    pool: Images,
    budget: float,
    size: int,
    seed: int,
    folder: Path,
    batch_size: int,
) -> dict[str, Any]:
    """Train a model with the library's own loop; says what it cost.

    Args:
        training: how.
        model: new heads on the backbone of stage 0.
        pool: training images, drawn from without repetition within a stage.
        budget: multiply-adds.
        size: pixels of a side.
        seed: of everything random.
        folder: of the checkpoints; an interrupted run goes on from there.
        batch_size: images of an update.
    """
    recipe = RECIPES[training.recipe]
    shares = {"stage1": 1.0}
    if recipe.stages == "both":
        shares = {"stage1": 1 - training.second}
        if training.second:
            shares["stage2"] = training.second
    stage = {"epochs": 1, "lr": training.lr, "warmup_epochs": 0.1}
    config = TrainConfig(
        output=str(folder),
        resume=True,
        seed=seed,
        batch_size=batch_size,
        workers=0,
        precision="bf16" if torch.backends.mkldnn.is_available() else "fp32",
        save_every=0,
        tensorboard=False,
        progress=False,
        stage1=Stage1Config(
            strategy=training.strategy or recipe.strategy,  # type: ignore[arg-type]
            alpha=training.alpha,
            **stage,  # type: ignore[arg-type]
        ),
        stage2=Stage2Config(**stage),  # type: ignore[arg-type]
    )
    spent: dict[str, Any] = {}
    for name, share in shares.items():
        model.train()
        objective = (
            Stage1(model, config.stage1) if name == "stage1" else Stage2(model, config.stage2)
        )
        cost = training_cost(objective, size)
        count = round(budget * share / cost / batch_size) * batch_size
        drawn = torch.randperm(len(pool), generator=generator(seed, name, "images"))
        held_out = pool.part(drawn[-batch_size:], None)  # one epoch: nothing is chosen by it
        sources = pool.part(drawn[:count], seed), held_out
        train_stage(name, model, sources, config, Process(torch.device("cpu")))
        spent[name] = {"images": count, "multiply_adds": round(cost * count)}
    model.freeze_backbone(False)
    model.eval()
    return spent


# ---------------------------------------------------------------------------- stage 0


def stage0(
    name: str, weights: Path, data: Path, pool: Images, size: int, count: int, lr: float, file: Path
) -> nn.Module:
    """The dense model for a data set: ImageNet weights, its classifier replaced, all fine-tuned once.

    The 200 classes of Tiny-ImageNet are ImageNet's, whose rows of the classifier they begin with; for
    CIFAR-10 it begins as a linear probe of the pretrained features.
    """
    classes = len(pool.class_names)
    model = timm.create_model(MODEL, num_classes=classes, img_size=size)
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    source = timm.create_model(MODEL)
    source.load_state_dict(load_file(weights))
    state = timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), model)
    rows = torch.zeros(classes, state["head.weight"].shape[1]), torch.zeros(classes)
    if name == "tiny_imagenet":
        known = json.loads((data / name / "classes.json").read_text())
        numbers = {entry["wnid"]: entry["imagenet_1k_index"] for entry in known}
        chosen = [numbers[wnid] for wnid in pool.class_names]
        rows = state["head.weight"][chosen], state["head.bias"][chosen]
    state["head.weight"], state["head.bias"] = rows
    model.load_state_dict(state)
    drawn = torch.randperm(len(pool), generator=generator("stage 0"))[:count]
    if name != "tiny_imagenet":
        probe(model.eval(), pool.part(drawn[:2048], None))
    fine_tune(model, pool.part(drawn, seed=0), lr, batch_size=64, seed=0)
    save_file(model.state_dict(), file)
    return model


@torch.no_grad()
def probe(model: nn.Module, images: Images) -> None:
    """Make the classifier the least-squares map from the pretrained features to the classes."""
    features = [
        model.forward_head(model.forward_features(batch.images), pre_logits=True)
        for batch in in_order(images)
    ]
    classes = F.one_hot(images.targets, len(images.class_names)).double()
    weight, bias = least_squares(torch.cat(features).double(), classes)
    sharpness = 8.0  # from shares of 0 and 1 to logits
    model.head.weight.copy_(sharpness * weight)
    model.head.bias.copy_(sharpness * bias)


def fine_tune(model: nn.Module, images: Images, lr: float, batch_size: int, seed: int) -> None:
    """One epoch of a dense model without exits."""
    seed_all(seed, "dense")
    loader = Loader(images, Batches(len(images), batch_size, training=True, seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(loader))
    model.train()
    start = time.time()
    for step, batch in enumerate(loader.epoch()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(batch.images), batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"dense {step}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    model.eval()


# ---------------------------------------------------------------------------- everything


def in_order(images: Images) -> Iterator[Batch]:
    """All images in order."""
    return Loader(images, Batches(len(images), 250, training=False)).epoch()


def recorded(model: lgvit_fast.LGViT, images: Images) -> Recording:
    """What every exit says of the images, in bf16 as in training."""
    return record(model, in_order(images), torch.autocast("cpu", torch.bfloat16))


def save_recording(recording: Recording, file: Path) -> None:
    """As safetensors: logits `[E + 1, n, K]` float16, targets `[n]`, layers `[E + 1]`."""
    save_file(
        {
            "logits": recording.logits.half().contiguous(),
            "targets": recording.labels,
            "layers": torch.tensor(recording.layers),
        },
        file,
    )


def load_recording(file: Path) -> Recording:
    """What `save_recording` wrote."""
    stored = load_file(file)
    return Recording(stored["logits"].float(), stored["targets"], tuple(stored["layers"].tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="ViT-Ti/16, safetensors")
    parser.add_argument("--out", type=Path, required=True, help="json, written after every run")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes_real"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--trainings", nargs="+", default=list(MAIN), choices=TRAININGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--stage0-images", type=int, default=6400)
    parser.add_argument("--stage0-lr", type=float, default=1e-4)
    parser.add_argument(
        "--images", type=int, default=3200, help="that the dense model could train on"
    )
    parser.add_argument(
        "--warm-images", type=int, default=1024, help="that exits are fitted to first"
    )
    parser.add_argument("--test-images", type=int, default=2000, help="a seed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tune", action="store_true", help="report on held-out training images")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="of every training"
    )
    args = parser.parse_args()
    timm.layers.set_fused_attn(False)  # the backward pass of the fused one is slow for 37 tokens
    args.runs.mkdir(parents=True, exist_ok=True)
    report = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    done = {(run["set"], run["training"], run["seed"]) for run in report["runs"]}
    report["machine"] = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
                         "threads": torch.get_num_threads(), "system": platform.platform()}  # fmt: skip
    changed = {key: json.loads(value) for key, value in (entry.split("=") for entry in args.set)}
    for seed in args.seeds:
        for training in args.trainings:
            for name in args.sets:
                if (name, training, seed) in done:
                    continue
                run = one(args, name, training, replace(TRAININGS[training], **changed), seed)
                report["runs"].append(run)
                args.out.write_text(json.dumps(report, indent=1) + "\n")


def one(
    args: argparse.Namespace, name: str, label: str, training: Training, seed: int
) -> dict[str, Any]:
    """One recipe on one data set with one seed; what it cost and how good it is."""
    whole = decode(args.data / name / "train.tar", args.size, POOL, args.runs)
    pool = Images(whole.pixels[:-HELD_OUT], whole.targets[:-HELD_OUT], whole.class_names)
    backbone = stage0(
        name, args.weights, args.data, pool, args.size, args.stage0_images, args.stage0_lr,
        args.runs / f"{name}-stage0.safetensors",
    )  # fmt: skip
    start, cpu = time.time(), time.process_time()
    budget = args.images * dense_cost(backbone, args.size)
    seed_all(seed, "heads")
    exits = None if training.exits is None else list(training.exits)
    if training.recipe == "dense":
        drawn = torch.randperm(len(pool), generator=generator(seed, "stage1", "images"))
        images = pool.part(drawn[: args.images], seed)
        fine_tune(backbone, images, training.lr, args.batch_size, seed)
        model = lgvit_fast.LGViT(
            backbone, exits=[1], heads="linear"
        ).eval()  # an exit not to be asked
        spent = {"stage1": {"images": args.images, "multiply_adds": round(budget)}}
    else:
        heads = training.heads or RECIPES[training.recipe].heads
        model = lgvit_fast.LGViT(backbone, exits=exits, heads=heads)
        folder = args.runs / f"{name}-{label}-{seed}"
        if training.warm:
            drawn = torch.randperm(len(pool), generator=generator(seed, "warm start"))
            warm_start(model, pool.part(drawn[: args.warm_images], None))
        spent = train_recipe(
            training, model, pool, budget, args.size, seed, folder, args.batch_size
        )
    trained, trained_cpu = time.time() - start, time.process_time() - cpu
    if args.tune:
        test = whole.part(torch.arange(len(whole) - HELD_OUT, len(whole))[: args.test_images], None)
    else:
        test = decode(args.data / name / SETS[name], args.size, 10_000, args.runs)
        places = torch.arange(seed * args.test_images, (seed + 1) * args.test_images) % len(test)
        test = test.part(places, None)
    recording = recorded(model, test)
    save_recording(recording, args.runs / f"{name}-{label}-{seed}.safetensors")
    run = {
        "set": name,
        "training": label,
        "seed": seed,
        "settings": vars(training),
        "spent": spent,
        "seconds": round(trained),
        "cpu_seconds": round(trained_cpu),
        "layers": recording.layers,
        "accuracy": [round(100 * value, 2) for value in recording.accuracies],
    }
    print(json.dumps(run), flush=True)
    return run


if __name__ == "__main__":
    main()
