"""One stage: epochs of updates, resumable at any moment."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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

from lgvit_fast import policies
from lgvit_fast.checkpoints.files import load_strictly, remove_leftovers, shortened
from lgvit_fast.checkpoints.fingerprint import fingerprint as fingerprint_of
from lgvit_fast.checkpoints.fit import malformed
from lgvit_fast.data.batches import BadImage, BadImageError, Batch, Batches, Loader, Source
from lgvit_fast.data.seeds import seed_all
from lgvit_fast.heads.synchronized import synchronized
from lgvit_fast.model import LGViT
from lgvit_fast.training.checkpoint import Checkpoint, differences
from lgvit_fast.training.config import StageConfig, TrainConfig
from lgvit_fast.training.fingerprint import fingerprint
from lgvit_fast.training.identity import describe_model
from lgvit_fast.training.logs import RunLog
from lgvit_fast.training.process import Process
from lgvit_fast.training.stages import Stage1, Stage2
from lgvit_fast.training.token_cache import CachedTokens
from lgvit_fast.training.validation import Accuracy, take_bad, validate

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
BEST = "best"
_FILES = (CHECKPOINT, "config.json", "metrics.jsonl", "model.safetensors", "README.md")

# config fields that may change when a run goes on: they alter where and how fast, not what
_FREE = {
    "output", "stage", "stage1_from", "init", "new_classes", "resume", "data", "val_data",
    "download", "val_batch_size", "workers", "skip_bad_images", "device", "log_every", "save_every",
    "tensorboard", "progress", "stage1", "stage2",
}  # fmt: skip


@dataclass(frozen=True)
class StageResult:
    """One stage's outcome.

    Attributes:
        best: folder of the best model (`LGViT.from_pretrained` reads it).
        accuracy: of the best model.
        best_epoch: when it was reached, counted from 1; 0 is before the first update.
        updates: optimizer updates in all.
        bad_images: unreadable images left out, each as often as it came up.
    """

    best: Path
    accuracy: Accuracy
    best_epoch: int
    updates: int
    bad_images: int


def train_stage(
    name: str, model: LGViT, sources: tuple[Source, Source], config: TrainConfig, process: Process
) -> StageResult:
    """Run one stage, `stage1` or `stage2`, from its checkpoint if `config.resume` and there is one.

    The model ends as the last epoch left it; the best one is in the folder that the result names.

    Raises:
        ConnectionError: another process of the run has ended.
    """
    with process.together():
        run = _StageRun(name, model, sources, config, process)
        if config.resume and run.path.exists():
            run.resume()
        return run.go()


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
            self.objective = Stage2(model, config.stage2, config.label_smoothing, config.labelled)
        model.train()
        if process.distributed:
            # the alternating strategies of stage 1 leave the heads out of every other update
            self.objective = nn.parallel.DistributedDataParallel(
                self.objective, find_unused_parameters=name == "stage1"
            )
        pin = process.device.type == "cuda" and not isinstance(sources[0], CachedTokens)
        batches = Batches(
            len(sources[0]),
            config.batch_size,
            training=True,
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
        )
        self.loader = Loader(sources[0], batches, _workers(sources[0], config), pin)
        size = config.val_batch_size or config.batch_size
        val_batches = Batches(len(sources[1]), size, training=False)
        self.val_loader = Loader(sources[1], val_batches, _workers(sources[1], config), pin)
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
        self.images: dict[str, str] | None = None  # their fingerprint, taken once
        self.progress = _Progress()
        self.lr = 0.0  # of the update just done
        self.log: RunLog | None = None

    # ------------------------------------------------------------------------------ running

    def go(self) -> StageResult:
        """Train to the end from where the progress stands."""
        progress = self.progress
        if self.process.primary:
            # only now: a run that was refused must not touch what is there
            for folder in (self.folder.parent, self.folder, self.folder / BEST):
                remove_leftovers(folder, _FILES)
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
            if not self.config.labelled and not progress.update:
                self._validate(epoch=0)  # what the warm start is worth; it may be the best there is
            while progress.epoch < self.epochs:
                self._epoch()
                self._validate(progress.epoch + 1)
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
        trained = progress.step > 0
        while progress.step < len(self.loader):
            count = min(accumulate, len(self.loader) - progress.step)
            values, images = self._update(batches, count)
            progress.step += count
            progress.update += 1
            trained = trained or bool(values)
            if self.log is not None:
                self.log.advance(images)
            last = progress.step >= len(self.loader)
            if values and (progress.update % self.config.log_every == 0 or last):
                self._log_values(values)
            every = self.config.save_every
            if every and progress.update % every == 0 and not last:
                if values:
                    self._check_finite(float(values["loss"]))
                self._save()
        if not trained:
            raise BadImageError(f"no batch of epoch {progress.epoch + 1} holds a readable image")

    def _update(self, batches: Iterator[Batch], count: int) -> tuple[dict[str, Tensor], int]:
        """One optimizer update over `count` batches; the mean of its values, and its images.

        Batches without a readable image are left out of the mean. If there is no other, nothing is
        updated, and there are no values.
        """
        progress, totals, seen, used = self.progress, dict[str, Tensor](), 0, 0
        for micro, images, targets, last in self._readable(batches, count):
            used += 1
            seen += len(targets) * self.process.world_size
            if last and used < count:  # so far everything was divided by `count`
                self._rescale(count / used)
                totals = {term: value * (count / used) for term, value in totals.items()}
                count = used
            key = (self.name, progress.epoch, progress.step + micro, self.process.rank)
            seed_all(self.config.seed, *key)
            images, targets = self._mix(images, targets)
            with nullcontext() if last else self._no_sync():
                with self._autocast(), synchronized(self.process.distributed):
                    loss, terms = self.objective(images, targets, progress.update)
                self._backward(loss / count, step=last)
            for term, value in {"loss": loss.detach(), **terms}.items():
                totals[term] = totals.get(term, 0.0) + value / count
        if used:
            self.optimizer.zero_grad()
        self.lr = max(group["lr"] for group in self.optimizer.param_groups)
        if self.ema is not None and used:
            self.ema.update(self.model, step=progress.update + 1)
        if self.scheduler is not None:  # "none"
            self.scheduler.step_update(progress.update + 1)
        return totals, seen

    def _readable(
        self, batches: Iterator[Batch], count: int
    ) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
        """Those of `count` batches that hold images: number, images, targets, and if it is the last."""
        held: tuple[int, Tensor, Tensor] | None = None
        for micro in range(count):
            images, targets = self._to_device(next(batches))
            if self._anybody_empty(targets):
                continue
            if held is not None:
                yield *held, False
            held = micro, images, targets
        if held is not None:
            yield *held, True

    def _anybody_empty(self, targets: Tensor) -> bool:
        """Whether this process, or any other, got no image: then all leave the batch out, in step."""
        if not (self.process.distributed and self.config.skip_bad_images):
            return not len(targets)
        fewest = torch.tensor([len(targets)], device=self.process.device)
        torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
        return not int(fewest)

    def _rescale(self, factor: float) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

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
        count = len(images)
        if count % 2:  # a skipped image can leave an odd number; Mixup takes pairs
            images, targets = torch.cat([images, images[:1]]), torch.cat([targets, targets[:1]])
        images, targets = self.mixup(images, targets)
        return images[:count], targets[:count]

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        bad: list[BadImage] | None = [] if self.config.skip_bad_images else None
        take_bad(batch, bad)
        self.progress.bad_images += len(batch.bad)
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

    def _validate(self, epoch: int) -> None:
        progress = self.progress
        if self.process.primary:
            bad: list[BadImage] | None = [] if self.config.skip_bad_images else None
            model = self.model if self.ema is None else self.ema.module
            accuracy = validate(
                model,
                self.val_loader,
                self.process.device,
                self._autocast(),
                bad,
                self.config.labelled,
            )
            # stage 2 changes the exits only
            score = accuracy.final if self.name == "stage1" else sum(accuracy.exits)
            assert self.log is not None
            row: dict[str, Any] = {"epoch": epoch}
            if self.config.labelled:
                row |= {"final_accuracy": accuracy.final, "exit_accuracy": list(accuracy.exits)}
            else:
                row["exit_agreement"] = list(accuracy.exits)
            self.log.validation(progress.update, row)
            if score > progress.best:
                progress.best, progress.best_epoch = score, epoch
                progress.best_accuracy = [*accuracy.exits, accuracy.final]
                model.save_pretrained(self.folder / BEST)
        if self.process.distributed:
            shared: list[Any] = [progress.best, progress.best_epoch, progress.best_accuracy]
            torch.distributed.broadcast_object_list(shared, src=0)
            progress.best, progress.best_epoch, progress.best_accuracy = shared

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that goes on from it."""
        config = self.config.to_dict()
        if self.images is None:
            self.images = fingerprint(self.loader.source, self.config.check_contents)
        # without labels the backbone is the task: its weights, not only their shapes, must be the same
        task = (
            {}
            if self.config.labelled
            else {"backbone": fingerprint_of(self.model.backbone.state_dict())}
        )
        return {
            **task,
            "stage": self.name,
            "model": describe_model(self.model),
            "config": {key: value for key, value in config.items() if key not in _FREE},
            self.name: config[self.name],
            "training images": self.loader.batches.length,
            "images in": self.images,
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
            "class_names": self.model.class_names,
            "policy": policies.to_dict(self.model.policy),
        }
        Checkpoint(state, self.facts()).save(self.path)

    def resume(self) -> None:
        """Go on exactly where the checkpoint was made.

        Raises:
            ValueError: if it is damaged, or belongs to another model, config, data set (number, names
                or sizes of its images) or number of processes.
        """
        checkpoint = Checkpoint.load(self.path)
        # a checkpoint of an older version says nothing of what has been added since
        added = {"images in": self.facts()["images in"]}
        saved = {**added, **checkpoint.facts}
        config = saved.get("config")
        if isinstance(config, dict):
            config.setdefault("check_contents", self.config.check_contents)
        found = differences(saved, self.facts())
        if found:
            raise ValueError(f"cannot resume {self.path}, it differs in " + "; ".join(found))
        state = checkpoint.state
        names = state.get("class_names")  # older checkpoints have none
        if names and names != self.model.class_names:
            raise ValueError(
                f"cannot resume {self.path}, its classes are {shortened(names)}, now they are"
                f" {shortened(self.model.class_names or ['without names'])}"
            )
        with malformed(self.path):
            load_strictly(self.model, state["model"], str(self.path))
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                load_strictly(self.ema.module, state["ema"], str(self.path))
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            self.progress = _Progress(**state["progress"])


def _workers(source: Source, config: TrainConfig) -> int:
    """Loader processes; tokens are copied faster than they could be handed from one to another."""
    return 0 if isinstance(source, CachedTokens) else config.workers
