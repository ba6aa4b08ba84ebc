"""The training loop: both stages, resumable at any moment.

Example:
    >>> config = TrainConfig(model="vit_tiny_patch16_224", data="flowers", output="runs/flowers")
    >>> result = train(config)
    >>> result.model  # the best one, in eval mode
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm.data
import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import Tensor, nn

from lgvit_fast.model import LGViT, create_model
from lgvit_fast.training.checkpoint import Checkpoint, differences
from lgvit_fast.training.config import StageConfig, TrainConfig
from lgvit_fast.training.data import (
    BadImage,
    BadImageError,
    Batch,
    Batches,
    Data,
    InputSpec,
    Loader,
    Source,
)
from lgvit_fast.training.logs import RunLog
from lgvit_fast.training.recipes import RECIPES
from lgvit_fast.training.rng import seed_all
from lgvit_fast.training.stages import Stage1, Stage2
from lgvit_fast.weights import load_json, load_weights

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
BEST = "best"

# config fields that may change when a run goes on: they alter where and how fast, not what
_FREE = {
    "output", "stage", "stage1_from", "resume", "data", "val_data", "download", "val_batch_size",
    "workers", "skip_bad_images", "device", "log_every", "save_every", "tensorboard", "progress",
    "stage1", "stage2",
}  # fmt: skip


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on the validation images, 0 to 1: of each exit, and of the final classifier."""

    exits: tuple[float, ...]
    final: float


@dataclass(frozen=True)
class StageResult:
    """One stage's outcome.

    Attributes:
        best: folder of the best model (`LGViT.from_pretrained` reads it).
        accuracy: of the best model.
        best_epoch: when it was reached, counted from 1.
        updates: optimizer updates in all.
        bad_images: unreadable images left out, each as often as it came up.
    """

    best: Path
    accuracy: Accuracy
    best_epoch: int
    updates: int
    bad_images: int


@dataclass(frozen=True)
class TrainResult:
    """A run's outcome.

    Attributes:
        model: the last stage's best model, in eval mode.
        stages: `stage1`, `stage2`, as far as they were run.
        output: the run's folder.
    """

    model: LGViT
    stages: dict[str, StageResult]
    output: Path


def train(config: TrainConfig, model: LGViT | None = None) -> TrainResult:
    """Train as `config` says.

    Under torchrun every process trains on its part of each batch (`batch_size` is per process).

    Args:
        config: the whole run.
        model: train this one, rather than the one that `config` names.

    Returns:
        The best model and how good it is.

    Raises:
        FileExistsError: if `output` holds a run and `resume` is not set.
        FileNotFoundError: if data, or the stage 1 model that stage 2 needs, are not there.
        ValueError: if a checkpoint belongs to another model or config, naming what differs.
        BadImageError: at an unreadable image, unless `skip_bad_images`.
        FloatingPointError: if the loss is no longer finite.
    """
    output = Path(config.output)
    names = ["stage1", "stage2"] if config.stage == "both" else [f"stage{config.stage}"]
    used = [output / name for name in names if (output / name / CHECKPOINT).exists()]
    if used and not config.resume:
        raise FileExistsError(
            f"{used[0]} holds a run; resume it (resume=True) or choose another output"
        )
    process = Process.start(config.device)
    data = Data.open(config)
    seed_all(config.seed, "init")
    if model is None:
        model = create_model(
            config.model,
            config.pretrained,
            exits=config.exits,
            heads=config.heads,
            num_classes=_num_classes(config, data),
            **config.model_kwargs,
        )
        if config.recipe is not None:
            model.policy = RECIPES[config.recipe].policy_for(len(model.exits))
    if data.class_names and len(data.class_names) > model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, the images {len(data.class_names)}"
        )
    if len(data.class_names) == model.num_classes:
        model.class_names = data.class_names
    model.to(process.device)
    sources = data.sources(InputSpec.of(model.backbone))
    stages = {}
    for name in names:
        if name == "stage2":
            load_stage1(config.stage1_from or output / "stage1" / BEST, model)
        stages[name] = train_stage(name, model, sources, config, process)
        load_model(stages[name].best, model)
    model.freeze_backbone(False)
    return TrainResult(model.eval(), stages, output)


def train_stage(
    name: str, model: LGViT, sources: tuple[Source, Source], config: TrainConfig, process: Process
) -> StageResult:
    """Run one stage, `stage1` or `stage2`, from its checkpoint if `config.resume` and there is one.

    The model ends as the last epoch left it; the best one is in the folder that the result names.
    """
    run = _StageRun(name, model, sources, config, process)
    if config.resume and run.path.exists():
        run.resume()
    return run.go()


@torch.no_grad()
def validate(
    model: LGViT,
    loader: Loader,
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
    bad: list[BadImage] | None = None,
) -> Accuracy:
    """Accuracy of every classifier, nobody leaving early. Unreadable images are added to `bad`.

    Raises:
        BadImageError: at an unreadable image, if `bad` is None.
    """
    was_training = model.training
    model.eval()
    right = torch.zeros(len(model.exits) + 1, dtype=torch.long, device=device)
    count = 0
    for batch in loader.epoch():
        _take_bad(batch, bad)
        if not len(batch.targets):
            continue
        targets = batch.targets.to(device, non_blocking=True)
        with autocast or nullcontext():
            outputs = model.forward_exits(batch.images.to(device, non_blocking=True))
        answers = torch.stack([logits.argmax(-1) for logits in (*outputs.exits, outputs.final)])
        right += (answers == targets).sum(dim=1)
        count += len(targets)
    model.train(was_training)
    shares = (right.double() / max(count, 1)).tolist()
    return Accuracy(tuple(shares[:-1]), shares[-1])


# -------------------------------------------------------------------------------- one process


@dataclass(frozen=True)
class Process:
    """Where this process computes, and its place among those of a torchrun."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, device: str | None = None) -> Process:
        """Join the other processes if there are any.

        Args:
            device: None takes a GPU if there is one.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            local = timm.utils.distributed.world_info_from_env()[0]
            place = torch.device(device, local) if device == "cuda" else torch.device(device)
            return cls(place, rank, world_size)
        joined = timm.utils.distributed.init_distributed_device_so(device)
        return cls(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])

    @property
    def primary(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1


@dataclass
class _Progress:
    """How far a stage has come; `step` counts the batches of the epoch under way."""

    epoch: int = 0
    step: int = 0
    update: int = 0
    best: float = -1.0
    best_epoch: int = 0
    best_accuracy: list[float] = field(default_factory=list)
    bad_images: int = 0


class _StageRun:
    """One stage under way: everything that changes, and its checkpoint."""

    def __init__(
        self,
        name: str,
        model: LGViT,
        sources: tuple[Source, Source],
        config: TrainConfig,
        process: Process,
    ) -> None:
        self.name, self.model, self.config, self.process = name, model, config, process
        self.folder = Path(config.output) / name
        self.path = self.folder / CHECKPOINT
        self.stage: StageConfig
        self.objective: nn.Module
        if name == "stage1":
            self.stage = config.stage1
            self.objective = Stage1(model, config.stage1, config.label_smoothing)
        else:
            self.stage = config.stage2
            self.objective = Stage2(model, config.stage2, config.label_smoothing)
        model.train()
        if process.distributed:
            # the alternating strategies of stage 1 leave the heads out of every other update
            self.objective = nn.parallel.DistributedDataParallel(
                self.objective, find_unused_parameters=name == "stage1"
            )
        pin = process.device.type == "cuda"
        batches = Batches(
            len(sources[0]),
            config.batch_size,
            training=True,
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
        )
        self.loader = Loader(sources[0], batches, config.workers, pin)
        size = config.val_batch_size or config.batch_size
        self.val_loader = Loader(
            sources[1], Batches(len(sources[1]), size, training=False), config.workers, pin
        )
        self.updates_per_epoch = -(-len(self.loader) // self.stage.accumulate)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = timm.optim.create_optimizer_v2(
            model,
            self.stage.opt,
            lr=self.stage.lr,
            weight_decay=self.stage.weight_decay,
            layer_decay=self.stage.layer_decay,
        )
        self.scheduler, self.epochs = timm.scheduler.create_scheduler_v2(
            self.optimizer,
            self.stage.sched,
            num_epochs=self.stage.epochs,
            warmup_epochs=self.stage.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=self.stage.warmup_lr,
            min_lr=self.stage.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )
        self.scaler: Any = None
        if config.precision == "fp16":
            self.scaler = timm.utils.NativeScaler(process.device.type)
        self.ema: Any = None
        if self.stage.ema_decay is not None:
            self.ema = timm.utils.ModelEmaV3(
                model, decay=self.stage.ema_decay, use_warmup=self.stage.ema_warmup
            )
        self.mixup: Any = None
        if config.mixup or config.cutmix:
            self.mixup = timm.data.Mixup(
                config.mixup,
                config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=model.num_classes,
            )
        self.progress = _Progress()
        self.lr = 0.0  # of the update just done
        self.log: RunLog | None = None

    # ------------------------------------------------------------------------------ running

    def go(self) -> StageResult:
        """Train to the end from where the progress stands."""
        progress = self.progress
        if self.process.primary:
            # only now: a run that was refused must not touch what is there
            self.config.save(self.folder.parent / "config.json")
            self.log = RunLog(
                self.folder,
                self.name,
                self.epochs * self.updates_per_epoch,
                progress.update,
                self.config.tensorboard,
                self.config.progress,
            )
        try:
            while progress.epoch < self.epochs:
                self._epoch()
                self._validate()
                progress.epoch, progress.step = progress.epoch + 1, 0
                self._save()
        finally:
            if self.log is not None:
                self.log.close()
        if progress.bad_images:
            logger.warning("%s left out %d unreadable images", self.name, progress.bad_images)
        accuracy = Accuracy(tuple(progress.best_accuracy[:-1]), progress.best_accuracy[-1])
        return StageResult(
            self.folder / BEST, accuracy, progress.best_epoch, progress.update, progress.bad_images
        )

    def _epoch(self) -> None:
        progress, accumulate = self.progress, self.stage.accumulate
        batches = self.loader.epoch(progress.epoch, progress.step)
        while progress.step < len(self.loader):
            count = min(accumulate, len(self.loader) - progress.step)
            values, images = self._update(batches, count)
            progress.step += count
            progress.update += 1
            if self.log is not None:
                self.log.advance(images)
            last = progress.step >= len(self.loader)
            if progress.update % self.config.log_every == 0 or last:
                self._log_values(values)
            every = self.config.save_every
            if every and progress.update % every == 0 and not last:
                self._check_finite(float(values["loss"]))
                self._save()

    def _update(self, batches: Iterator[Batch], count: int) -> tuple[dict[str, Tensor], int]:
        """One optimizer update over `count` batches; the mean of its values, and its images."""
        progress, totals, seen = self.progress, dict[str, Tensor](), 0
        for micro in range(count):
            images, targets = self._to_device(next(batches))
            seen += len(targets) * self.process.world_size
            key = (self.name, progress.epoch, progress.step + micro, self.process.rank)
            seed_all(self.config.seed, *key)
            images, targets = self._mix(images, targets)
            last = micro == count - 1
            with nullcontext() if last else self._no_sync():
                with self._autocast():
                    loss, terms = self.objective(images, targets, progress.update)
                self._backward(loss / count, step=last)
            for term, value in {"loss": loss.detach(), **terms}.items():
                totals[term] = totals.get(term, 0.0) + value / count
        self.optimizer.zero_grad()
        self.lr = max(group["lr"] for group in self.optimizer.param_groups)
        if self.ema is not None:
            self.ema.update(self.model, step=progress.update + 1)
        if self.scheduler is not None:  # "none"
            self.scheduler.step_update(progress.update + 1)
        return totals, seen

    def _backward(self, loss: Tensor, step: bool) -> None:
        clip, mode = self.stage.clip_grad, self.stage.clip_mode
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip, mode, self.parameters, need_update=step)
            return
        loss.backward()
        if step:
            if clip is not None:
                timm.utils.dispatch_clip_grad(self.parameters, clip, mode)
            self.optimizer.step()

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixup is None:
            return images, targets
        even = len(images) // 2 * 2  # a skipped image can leave an odd number
        mixed: tuple[Tensor, Tensor] = self.mixup(images[:even], targets[:even])
        return mixed

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        bad: list[BadImage] | None = [] if self.config.skip_bad_images else None
        _take_bad(batch, bad)
        self.progress.bad_images += len(batch.bad)
        if not len(batch.targets):
            raise BadImageError(f"no image of a batch can be read; the first: {batch.bad[0].name}")
        device = self.process.device
        images = batch.images.to(device, non_blocking=True)
        return images, batch.targets.to(device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.process.device.type, dtype)

    def _no_sync(self) -> AbstractContextManager[Any]:
        return self.objective.no_sync() if self.process.distributed else nullcontext()  # type: ignore[operator]

    def _log_values(self, values: dict[str, Tensor]) -> None:
        if self.process.distributed:
            values = {
                k: timm.utils.reduce_tensor(v, self.process.world_size) for k, v in values.items()
            }
        numbers = {name: float(value) for name, value in values.items()}
        self._check_finite(numbers["loss"])
        if self.log is not None:
            row = {"epoch": self.progress.epoch + 1, **numbers, "lr": self.lr}
            self.log.train(self.progress.update, row)

    def _check_finite(self, loss: float) -> None:
        if loss - loss != 0:
            raise FloatingPointError(
                f"the loss is {loss} after {self.progress.update} updates of {self.name}; try a"
                " lower learning rate, or bf16 in place of fp16 (the checkpoint is from before)"
            )

    # ------------------------------------------------------------------ validation, checkpoints

    def _validate(self) -> None:
        progress = self.progress
        if self.process.primary:
            bad: list[BadImage] | None = [] if self.config.skip_bad_images else None
            model = self.model if self.ema is None else self.ema.module
            accuracy = validate(model, self.val_loader, self.process.device, self._autocast(), bad)
            # stage 2 changes the exits only
            score = accuracy.final if self.name == "stage1" else sum(accuracy.exits)
            assert self.log is not None
            row = {
                "epoch": progress.epoch + 1,
                "final_accuracy": accuracy.final,
                "exit_accuracy": list(accuracy.exits),
            }
            self.log.validation(progress.update, row)
            if score > progress.best:
                progress.best, progress.best_epoch = score, progress.epoch + 1
                progress.best_accuracy = [*accuracy.exits, accuracy.final]
                model.save_pretrained(self.folder / BEST)
        if self.process.distributed:
            shared: list[Any] = [progress.best, progress.best_epoch, progress.best_accuracy]
            torch.distributed.broadcast_object_list(shared, src=0)
            progress.best, progress.best_epoch, progress.best_accuracy = shared

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that goes on from it."""
        config = self.config.to_dict()
        return {
            "stage": self.name,
            "model": _describe(self.model),
            "config": {key: value for key, value in config.items() if key not in _FREE},
            self.name: config[self.name],
            "training images": self.loader.batches.length,
            "processes": self.process.world_size,
        }

    def _save(self) -> None:
        if not self.process.primary:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "progress": vars(self.progress),
        }
        Checkpoint(state, self.facts()).save(self.path)

    def resume(self) -> None:
        """Go on exactly where the checkpoint was made.

        Raises:
            ValueError: if it belongs to another model, config, data set size or number of processes.
        """
        for left_by_a_kill in self.folder.glob(f".{CHECKPOINT}.*"):
            left_by_a_kill.unlink(missing_ok=True)
        checkpoint = Checkpoint.load(self.path)
        found = differences(checkpoint.facts, self.facts())
        if found:
            raise ValueError(f"cannot resume {self.path}, it differs in " + "; ".join(found))
        state = checkpoint.state
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = _Progress(**state["progress"])


# ------------------------------------------------------------------------------- models on disk


def describe(config: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What makes two models interchangeable: backbone, classes, exits and the shape of each weight.

    Args:
        config: what `LGViT.get_config` gives.
        weights: the state dict.
    """
    facts = {key: value for key, value in config.items() if key not in ("policy", "class_names")}
    facts["exits"] = [f"{spec['head']} after block {spec['layer']}" for spec in config["exits"]]
    if facts["backbone"] is not None:
        arguments = facts["backbone"]["args"].items()
        kept = {key: value for key, value in arguments if "drop" not in key}
        facts["backbone"] = {**facts["backbone"], "args": kept}
    facts["weights"] = {name: list(value.shape) for name, value in weights.items()}
    return facts


def load_stage1(path: str | Path, model: LGViT) -> None:
    """Give `model` the weights of a stage 1 run: a saved model folder, or its training checkpoint.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is of another stage, or of a model that differs, naming what does.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"stage 2 starts from a stage 1 model, and there is none at {path}; run stage 1 first, or"
            " name a saved model folder or a stage 1 checkpoint in stage1_from"
        )
    if path.is_dir():
        load_model(path, model)
        return
    checkpoint = Checkpoint.load(path)
    if checkpoint.facts.get("stage") != "stage1":
        raise ValueError(
            f"{path} is a checkpoint of {checkpoint.facts.get('stage')}, not of stage1"
        )
    _require_same(path, checkpoint.facts["model"], _describe(model))
    weights = checkpoint.state["ema"] or checkpoint.state["model"]
    model.load_state_dict(weights)


def load_model(folder: str | Path, model: LGViT) -> None:
    """Give `model` the weights of a saved one, after checking that they are the same model.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the two differ, naming what differs.
    """
    config = load_json(Path(folder) / "config.json")
    weights = load_weights(Path(folder) / "model.safetensors")
    _require_same(Path(folder), describe(config, weights), _describe(model))
    model.load_state_dict(weights)


def _describe(model: LGViT) -> dict[str, Any]:
    return describe(model.get_config(), model.state_dict())


def _require_same(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    found = differences(saved, current)
    if found:
        raise ValueError(f"{path} holds another model: " + "; ".join(found))


def _num_classes(config: TrainConfig, data: Data) -> int:
    if config.num_classes is not None:
        return config.num_classes
    if not data.class_names:
        raise ValueError(
            f"the dataset {config.dataset!r} does not name its classes: give num_classes"
        )
    return len(data.class_names)


def _take_bad(batch: Batch, bad: list[BadImage] | None) -> None:
    """Collect a batch's unreadable images, or stop at them."""
    for image in batch.bad:
        if bad is None:
            raise BadImageError(f"cannot read {image.name}: {image.reason}")
        if not bad or image not in bad:
            logger.warning("left out %s: %s", image.name, image.reason)
        bad.append(image)
