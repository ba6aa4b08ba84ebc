"""What a training run is made of: `TrainConfig`, plain data that survives a round trip through JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lgvit_fast.backbones.timm_arguments import check_arguments
from lgvit_fast.checkpoints.files import load_json, save_json
from lgvit_fast.checkpoints.fit import malformed
from lgvit_fast.training.losses import STRATEGIES, Strategy
from lgvit_fast.training.recipes import RECIPES

Stage = Literal["1", "2", "both"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(kw_only=True)
class StageConfig:
    """How one stage is optimised; optimizer, schedule and clipping are timm's.

    Attributes:
        epochs: passes over the training images.
        lr: peak learning rate.
        opt: any timm optimizer name.
        weight_decay: not applied to biases, norms and what the backbone excludes.
        layer_decay: factor per layer of the learning rate, from the top down; None: no decay.
        sched: any timm schedule that is a function of the update (`cosine`, `step`, `poly`, ...).
        warmup_epochs: linear warm-up at the start of `epochs`; fractions are allowed.
        warmup_lr: learning rate at the first update of the warm-up.
        min_lr: where the schedule ends.
        clip_grad: gradient clipping value; None: no clipping.
        clip_mode: `norm`, `value` or `agc`.
        accumulate: batches whose gradients are added up for one update.
        ema_decay: keep an exponential moving average of the weights and prefer it; None: no EMA.
        ema_warmup: start the average with a small decay that grows to `ema_decay`.
    """

    epochs: int = 50
    lr: float = 5e-5
    opt: str = "adamw"
    weight_decay: float = 0.05
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    clip_grad: float | None = 1.0
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    accumulate: int = 1
    ema_decay: float | None = None
    ema_warmup: bool = True

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "at least 1")
        _require(
            0 <= self.warmup_epochs < self.epochs,
            "warmup_epochs",
            self.warmup_epochs,
            f"in [0, epochs = {self.epochs})",
        )
        if self.sched == "plateau":
            raise ValueError(
                "sched is 'plateau', whose state cannot be resumed exactly; use another"
            )
        if self.ema_decay is not None:
            _require(0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "in (0, 1)")


@dataclass(kw_only=True)
class Stage1Config(StageConfig):
    """Stage 1: backbone and heads, end to end.

    Attributes:
        strategy: how the classifiers' losses combine, see `losses.stage1_loss`.
        alpha: weight of the distillation in the two `distillation` strategies.
    """

    strategy: Strategy = "alternating_weighted"
    alpha: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.strategy in STRATEGIES,
            "strategy",
            self.strategy,
            f"one of {', '.join(STRATEGIES)}",
        )


@dataclass(kw_only=True)
class Stage2Config(StageConfig):
    """Stage 2: the heads alone, taught by the frozen backbone.

    Attributes:
        strategy: `lgvit`, with the feature distillation of local and global heads, or `distillation`,
            of the logits alone, which fits any heads (see `losses.Stage2Losses`).
        alpha: share of the logit distillation; the cross-entropy gets `1 - alpha`.
        beta: weight of the heterogeneous feature distillation.
        gamma: weight of the homogeneous feature distillation.
        temperature: softens the logits for distillation.
        published: the published code's teachers and Gram matrices, for parity with its numbers.
    """

    strategy: Literal["lgvit", "distillation"] = "lgvit"
    alpha: float = 0.3
    beta: float = 0.01
    gamma: float = 0.01
    temperature: float = 2.0
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("lgvit", "distillation")
        _require(self.strategy in known, "strategy", self.strategy, f"one of {', '.join(known)}")
        _require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")
        _require(self.temperature > 0, "temperature", self.temperature, "above 0")


@dataclass(kw_only=True)
class TrainConfig:
    """A whole run.

    Attributes:
        output: folder of the run: `stage1/` and `stage2/` with checkpoint, best model and logs.
        stage: `1`, `2`, or `both` in turn.
        stage1_from: where stage 2 alone takes its model: a saved model folder, or a stage 1
            checkpoint. None: the model of `init`, or else `output/stage1/best`.
        resume: continue an interrupted run in `output` exactly; False refuses a folder in use.
        seed: of everything random. Same seed, machine and config: same losses.

        init: begin with this model instead of a new one: a saved model's folder or `hf-hub:user/model`,
            whose exits, class names and policy it keeps; or timm's name of pretrained weights, a folder
            or a checkpoint of timm, which gets `exits` and `heads` (`model` names the architecture of
            a file that does not).
        new_classes: give the model of `init` new classifiers for the classes of the images, where its
            own are others.
        model: timm name of the backbone.
        model_kwargs: further arguments of the timm model (`img_size`, `depth`, `in_chans`, ...).
        pretrained: start from timm's pretrained weights.
        exits: how many exits, or their blocks counted from 1; None: the default for the depth.
        heads: head of each exit (`lph_full`, `lph_light`, `gah_2`, ...) or one for all (`linear`,
            `vit_ee`, `conv`, `attention`, `mlp`); None: the default rule.
        recipe: a compared method, whose heads, stage 1 strategy, stages and exit policy are taken:
            `sdn`, `pabee`, `berxit`, `vit_ee`, `pcee`, `lgvit` or `lgvit_joint`.
        num_classes: None: as many as the data has.

        data: folder or tar of class folders, root of a named dataset, or `digits` (bundled).
        dataset: timm dataset name (`torch/cifar10`, `hfds/...`); empty: class folders.
        download: let the named dataset fetch itself.
        train_split: of a named dataset, or sub-folder of `data`.
        val_split: likewise, for validation.
        val_data: folder or tar for validation; None: `val_split`, or a held-out part of `data`.
        val_fraction: part of the training images held out where nothing else is for validation.
        check_contents: read every training image at the start, so that a resumed run notices other
            contents too, not only other names and sizes.
        batch_size: images per batch and process.
        val_batch_size: None: as `batch_size`.
        workers: loader processes; 0 loads in the training process. Changes no result.
        skip_bad_images: leave out unreadable images and count them, rather than stop.

        augment: random training transforms; False only resizes.
        crop_scale: smallest and largest share of the area that a random crop keeps.
        hflip: probability of a horizontal flip.
        color_jitter: strength; 0 for none.
        auto_augment: timm policy, such as `rand-m9-mstd0.5-inc1`.
        random_erasing: probability.
        mixup: alpha of Mixup; 0: off.
        cutmix: alpha of CutMix; 0: off.
        label_smoothing: of all cross-entropies.

        device: None: a GPU if there is one.
        precision: `fp32`, or autocast to `bf16` or `fp16` (with loss scaling).
        log_every: updates between rows of `metrics.jsonl` and TensorBoard.
        save_every: updates between checkpoints, beside one after every epoch; 0: only those.
        tensorboard: write TensorBoard logs, if it is installed.
        progress: show progress bars.
    """

    output: str = "runs/train"
    stage: Stage = "both"
    stage1_from: str | None = None
    resume: bool = False
    seed: int = 0

    init: str | None = None
    new_classes: bool = False
    model: str = "vit_base_patch16_224"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    exits: int | list[int] | None = None
    heads: str | list[str] | None = None
    recipe: str | None = None
    num_classes: int | None = None

    data: str = "digits"
    dataset: str = ""
    download: bool = False
    train_split: str = "train"
    val_split: str = "validation"
    val_data: str | None = None
    val_fraction: float = 0.1
    check_contents: bool = False
    batch_size: int = 64
    val_batch_size: int | None = None
    workers: int = 2
    skip_bad_images: bool = False

    augment: bool = True
    crop_scale: tuple[float, float] = (0.3, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.3
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    device: str | None = None
    precision: Precision = "fp32"
    log_every: int = 10
    save_every: int = 500
    tensorboard: bool = True
    progress: bool = True

    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)

    labelled: ClassVar[bool] = True  # whether the classes of the images are looked at

    def __post_init__(self) -> None:
        if isinstance(self.heads, list) and len(self.heads) == 1:
            self.heads = self.heads[0]
        if self.recipe is not None:
            self._follow(self.recipe)
        self.crop_scale = (float(self.crop_scale[0]), float(self.crop_scale[1]))
        for name, allowed in (("stage", get_args(Stage)), ("precision", get_args(Precision))):
            value = getattr(self, name)
            _require(value in allowed, name, value, f"one of {', '.join(allowed)}")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.workers >= 0, "workers", self.workers, "at least 0")
        _require(self.log_every >= 1, "log_every", self.log_every, "at least 1")
        _require(self.save_every >= 0, "save_every", self.save_every, "at least 0")
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "in (0, 1)")
        if self.new_classes and self.init is None:
            raise ValueError("new_classes is set, but there is no model in init to change")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected an even one for Mixup or CutMix"
            )

    def _follow(self, name: str) -> None:
        """Take what the recipe says; what was set otherwise already must agree with it."""
        if name not in RECIPES:
            near = difflib.get_close_matches(name, RECIPES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"recipe is {name!r}, expected one of {', '.join(RECIPES)}{hint}")
        recipe, usual = RECIPES[name], Stage1Config().strategy
        for field_name, found, allowed in (
            ("heads", self.heads, (None, recipe.heads)),
            ("stage1.strategy", self.stage1.strategy, (usual, recipe.strategy)),
            ("stage", self.stage, ("both", "1") if recipe.stages == "1" else get_args(Stage)),
        ):
            if found not in allowed:
                fitting = [key for key, r in RECIPES.items() if found in (r.heads, r.strategy)]
                hint = f"; {found!r} belongs to {', '.join(fitting)}" if fitting else ""
                raise ValueError(
                    f"{field_name} is {found!r}, but recipe {name!r} wants {allowed[-1]!r}{hint};"
                    " leave out one of them"
                )
        self.heads = recipe.heads
        self.stage1.strategy = recipe.strategy
        if recipe.stages == "1":
            self.stage = "1"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """From what `to_dict` gave, or a part of it.

        Raises:
            ValueError: if a name is unknown or a value impossible.
        """
        values = dict(values)
        for name, stage in (("stage1", Stage1Config), ("stage2", Stage2Config)):
            if isinstance(values.get(name), dict):
                values[name] = _build(stage, values[name], f"{name}.")
        config: TrainConfig = _build(cls, values, "")
        return config

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        save_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: not such a file, or one with arguments of timm's that no file may set.
        """
        values = load_json(path)
        with malformed(path):
            if not isinstance(values, dict):
                raise ValueError(f"{path} holds a {type(values).__name__}, expected a json object")
            config = cls.from_dict(values)
            ours = ("pool", "exit_num_heads")
            theirs = {k: v for k, v in config.model_kwargs.items() if k not in ours}
            check_arguments(theirs, f"model_kwargs of {path}")
        return config


def distillation_stage(**fields: Any) -> Stage2Config:
    """Stage 2 as `distill` runs it: faster, and without the feature terms, which cost much."""
    return Stage2Config(**{"epochs": 5, "lr": 1e-3, "beta": 0.0, "gamma": 0.0, **fields})


@dataclass(kw_only=True)
class DistillConfig(TrainConfig):
    """A run without labels: stage 2 alone, of a trained classifier (`lgvit_fast.distill`).

    The fields of `TrainConfig` mean what they mean there; `alpha`, the share of the cross-entropy that
    there is not, means nothing.

    Attributes:
        warm_start: begin with exits that a least-squares fit to the model's own logits gave, where they
            were never trained; False: with random ones.
        warm_start_images: how many images the fit takes.
        cache: most bytes on disk for the backbone's tokens, which are then computed once for every
            image, of a fixed crop and (with `augment` and `hflip`) its mirror image; None: anew in each
            epoch, of random crops.
        cache_folder: keep the cache there, for other runs with the same exits; None: in `output`, while
            the run lasts.
    """

    output: str = "runs/distill"
    stage: Stage = "2"
    stage2: Stage2Config = field(default_factory=lambda: distillation_stage())
    warm_start: bool = True
    warm_start_images: int = 2048
    cache: int | None = None
    cache_folder: str | None = None
    min_agreement: float | None = None

    labelled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.stage == "2", "stage", self.stage, "'2', the only one without labels")
        for name in ("recipe", "stage1_from", "pretrained", "new_classes", "mixup", "cutmix"):
            value = getattr(self, name)
            _require(not value, name, value, "nothing: it has no part in distillation")
        _require(not self.stage2.published, "stage2.published", True, "False: it needs labels")
        images = self.warm_start_images
        _require(images >= 1, "warm_start_images", images, "at least 1")
        _require(
            self.cache is None or self.cache > 0, "cache", self.cache, "bytes above 0, or None"
        )
        if self.cache_folder is not None and self.cache is None:
            raise ValueError("cache_folder is given, but not cache, how large it may become")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    names = [entry.name for entry in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ValueError(f"the training config has no field {prefix}{name}{hint}")
    return cls(**values)


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
