"""LGViT: a timm model with early exits (paper section 3), and a batch's way through it."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from PIL.Image import Image
from torch import Tensor, nn

from lgvit_fast import policies
from lgvit_fast.backbones import adapt
from lgvit_fast.backbones.timm_models import (
    describe_backbone,
    make_backbone,
    remake_backbone,
    set_layer_norm_eps,
    with_pooling,
)
from lgvit_fast.certificate import Certificate
from lgvit_fast.heads import ExitHead, ExitSpec, resolve_exits
from lgvit_fast.model_config import FORMAT, check_config
from lgvit_fast.outputs import ExitOutputs, Inference
from lgvit_fast.parameter_names import module_names
from lgvit_fast.policies import Confidence, Policy
from lgvit_fast.segments import cut, run_segments
from lgvit_fast.timm_interface import TimmInterface

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LGViT", "create_model"]


class LGViT(TimmInterface, nn.Module):
    """A timm classifier whose easy images leave early.

    In `state_dict()` the wrapped model's weights have its own names after `backbone.`, the heads'
    begin with `exit_heads.`. Files keep timm's names, and both can be loaded. In train mode a call
    gives `ExitOutputs` of all exits; in eval mode it gives logits `[B, K]`, each image's from the first
    exit that is sure under `policy`.

    Args:
        timm_model: a timm ViT, DeiT, Swin or Eva with a classifier (docs/backbones.md lists them).
        exits: where: None (the default layout), a count, block numbers from 1, or `ExitSpec`s.
        num_classes: K; a new classifier is made if it differs from the model's own.
        heads: what: one of "lph_full", "lph_light", "gah_r", ... for each exit (see `ExitSpec`), or one
            name for all: "linear", "vit_ee", "conv", "attention", "mlp". None or "lgvit": the paper's.
        pool: grid pooling of global heads, "subsample" (as published) or "average".
        num_heads: attention heads of heads that attend; must divide the width.

    Attributes:
        backbone: the timm model.
        exits: tuple of `ExitSpec`, shallow to deep.
        exit_heads: the heads, in the same order.
        num_blocks: L.
        num_classes: K.
        class_names: what the classes are called, in their order, or None; saved with the model.
        backbone_config: how timm makes the backbone by name, or None if that cannot be said.

    Raises:
        ValueError: an unsupported model, no classes, or exits and heads that do not fit it.
    """

    def __init__(
        self,
        timm_model: nn.Module,
        exits: int | Sequence[int] | Sequence[ExitSpec] | None = None,
        num_classes: int | None = None,
        *,
        heads: str | Sequence[str] | None = None,
        pool: str = "subsample",
        num_heads: int = 8,
    ) -> None:
        super().__init__()
        adapt(timm_model)  # refuses an unsupported model before it is changed
        if num_classes is not None and num_classes != timm_model.num_classes:
            timm_model.reset_classifier(num_classes)  # type: ignore[operator]
        self.backbone = timm_model
        self.adapter = adapt(timm_model)
        self.num_blocks = self.adapter.num_blocks
        self.num_classes = self.adapter.num_classes
        if self.num_classes < 1:
            raise ValueError("the timm model has no classifier: give num_classes")
        self._class_names: list[str] | None = None
        self.exits = resolve_exits(exits, heads, self.num_blocks, self.adapter.depths)
        self.pool, self.num_heads = pool, num_heads
        self.exit_heads = nn.ModuleList(
            ExitHead(
                spec,
                self.adapter.width(spec.layer),
                self.num_classes,
                self.adapter.num_prefix_tokens,
                self.adapter.num_class_tokens,
                num_heads,
                pool,
                self.adapter.exit_norm,
            )
            for spec in self.exits
        )
        self.cut_segments()
        parameter = next(timm_model.parameters())
        self.exit_heads.to(parameter.device, parameter.dtype)
        self._policy: Policy = Confidence()
        self._certificate: Certificate | None = None
        self._backbone_frozen = False
        self.backbone_config = describe_backbone(timm_model)
        self.register_load_state_dict_pre_hook(_take_names_of_files)  # type: ignore[no-untyped-call]
        self.train(timm_model.training)

    def cut_segments(self) -> None:
        """Make `segments` from the blocks, heads and classifier as they are now."""
        layers = tuple(spec.layer for spec in self.exits)
        self.segments = cut(self.adapter, layers, tuple(self._heads))

    @property
    def policy(self) -> Policy:
        """When an image is sure enough to leave; used by eval-mode calls and by default in `infer`."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = self.fitting(policy)
        certificate = self._certificate
        if certificate is not None and certificate.policy != policies.to_dict(policy):
            self._certificate = None

    @property
    def certificate(self) -> Certificate | None:
        """What a calibration has shown of `policy`; saved with it, and gone when it is changed."""
        return self._certificate

    @certificate.setter
    def certificate(self, certificate: Certificate | None) -> None:
        if certificate is not None:
            layers = (*(spec.layer for spec in self.exits), self.num_blocks)
            certificate.require(policies.to_dict(self.policy), layers, self.num_classes)
        self._certificate = certificate

    @property
    def class_names(self) -> list[str] | None:
        """What the K classes are called, in their order, or None; saved with the model."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        if names is None:
            self._class_names = None
            return
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names is {names!r}, expected a list of strings or None")
        if len(names) != self.num_classes:
            raise ValueError(
                f"class_names has {len(names)} entries, the model has {self.num_classes} classes"
            )
        self._class_names = list(names)

    @property
    def untrained_exits(self) -> tuple[int, ...]:
        """The blocks (from 1) whose exits were never trained; see `ExitHead.trained`."""
        return tuple(
            spec.layer
            for spec, head in zip(self.exits, self._heads, strict=True)
            if not head.trained
        )

    def forward(self, images: Tensor) -> ExitOutputs | Tensor:
        """`ExitOutputs` in train mode, logits `[B, K]` with early exit in eval mode."""
        return self.forward_exits(images) if self.training else self.infer(images).logits

    def forward_exits(self, images: Tensor, features: bool = False) -> ExitOutputs:
        """Run every image to the end and ask every exit. Differentiable, in either mode.

        Args:
            images: `[B, channels, height, width]`.
            features: also give the heads' features and the last block's tokens (stage 2 needs them).

        Raises:
            ValueError: images of another shape, size, dtype or device than the model wants.
        """
        self.adapter.check_images(images)
        size = (images.shape[2], images.shape[3])
        outputs: list[tuple[Tensor, Tensor | None]] = []
        tokens = images
        for segment in self.segments:
            with self._backbone_grad():
                tokens = segment.blocks(tokens, size)
            with self._backbone_grad() if segment.is_last else nullcontext():
                outputs.append(segment.logits(tokens, size))
        *exits, (final, _) = outputs
        patches = self.adapter.to_tokens(tokens)[:, self.adapter.num_prefix_tokens :]
        return ExitOutputs(
            exits=tuple(logits for logits, _ in exits),
            final=final,
            features=tuple(cast(Tensor, feature) for _, feature in exits) if features else None,
            last_tokens=patches if features else None,
            patch_grid=self.adapter.patch_grid(size, self.num_blocks),
        )

    @torch.no_grad()
    def infer(self, images: Tensor, policy: Policy | None = None) -> Inference:
        """Answer each image at the first exit that is sure; the others go on, compacted.

        An image's answer does not depend on the batch it comes in.

        Args:
            images: `[B, channels, height, width]`; B = 0 is fine.
            policy: None takes `self.policy`.

        Raises:
            RuntimeError: the model is in train mode, or being exported as a whole.
            ValueError: images of another shape, size, dtype or device than the model wants, or a
                policy for another number of exits.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "a whole LGViT cannot be exported: which blocks run depends on the images."
                " Export model.segments one by one and choose between them in a loop outside"
                " the graphs"
            )
        policy = self.admit(images, policy)
        answer = self.blank(len(images), images.device)
        self.prepare()
        run_segments(self.segments, images, policy, answer)
        return answer

    def blank(self, batch: int, device: torch.device) -> Inference:
        """An `Inference` of `batch` images, to be filled in."""
        names = self.class_names
        return Inference.blank(batch, self.num_classes, self.compute_dtype, device, names)

    def admit(self, images: Tensor, policy: Policy | None = None) -> Policy:
        """The policy to answer `images` under; raises what `infer` raises if it could not."""
        if self.training:
            raise RuntimeError("infer needs eval mode: call model.eval() first")
        self.adapter.check_images(images)
        return self._policy if policy is None else self.fitting(policy)

    def predict(self, images: Any, *, batch_size: int = 64) -> Inference:
        """Answer image files or PIL images, with the transform that the model was made for.

        Args:
            images: a path, a `PIL.Image.Image`, or a sequence of them.
            batch_size: images at a time.

        Returns:
            One answer an image, on the model's device.

        Raises:
            RuntimeError: the model is in train mode.
            ValueError: a file that is no readable image, named.
        """
        from lgvit_fast.data.transforms import InputSpec, to_batch

        single = isinstance(images, str | os.PathLike | Image)
        items = [images] if single else list(images)
        spec, parameter = InputSpec.of(self.backbone), next(self.parameters())
        answers = [
            self.infer(to_batch(items[start : start + batch_size], spec).to(parameter))
            for start in range(0, len(items), batch_size)
        ]
        return Inference.cat(answers) if answers else self.blank(0, parameter.device)

    @torch.compiler.disable  # a compiled model must see changed weights too
    def prepare(self, *, anew: bool = False) -> None:
        """Fold the heads' weights for inference, where they changed. `infer` does it by itself.

        Args:
            anew: fold all, whether or not a change was seen (see `ExitHead.prepare`).
        """
        for head in self._heads:
            head.prepare(self.compute_dtype, anew=anew)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers for another number of classes, the final one and every exit's.

        Args:
            num_classes: K.
            global_pool: how the backbone pools its last tokens, as timm names it ("token", "avg", ...);
                None leaves that as it is. The exits are not changed by it.

        Raises:
            ValueError: no classes.
        """
        if num_classes < 1:
            raise ValueError(
                f"num_classes={num_classes}, expected at least 1: exits are classifiers"
            )
        self.backbone.reset_classifier(num_classes, global_pool)
        for head in self._heads:
            head.reset_classifiers(num_classes)
        self.num_classes = self.adapter.num_classes = num_classes
        self.class_names = None
        if self.backbone_config is not None:
            self.backbone_config["args"]["num_classes"] = num_classes
            if global_pool is not None:
                self.backbone_config = with_pooling(
                    self.backbone, self.backbone_config, global_pool
                )
        self.cut_segments()

    def freeze_backbone(self, frozen: bool = True) -> None:
        """Keep the backbone as it is: eval mode whatever `train` says, and no gradients (stage 2)."""
        self._backbone_frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> LGViT:
        """Sets the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self._backbone_frozen:
            self.backbone.eval()
        return self

    def get_config(self) -> dict[str, Any]:
        """Everything but the weights, as json types: backbone, exits, heads, policy, certificate."""
        return {
            "format": FORMAT,
            "backbone": self.backbone_config,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "exits": [dataclasses.asdict(spec) for spec in self.exits],
            "pool": self.pool,
            "num_heads": self.num_heads,
            "policy": policies.to_dict(self.policy),
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], backbone: nn.Module | None = None) -> Self:
        """Make a model with fresh weights from what `get_config` gave.

        The config may come from a file: it sets sizes, rates, switches and names of layers, never
        what is opened, fetched or loaded.

        Raises:
            ValueError: another format, an entry of another type or range, an argument of timm's that
                no file may set, or the backbone cannot be made by name and none was given.
        """
        check_config(config)
        made = config["backbone"]
        if backbone is None:
            if made is None:
                raise ValueError(
                    "the backbone was not made by timm.create_model with plain arguments,"
                    " so its config does not say how to make it again: give backbone="
                )
            backbone = remake_backbone(made)
        model = cls(
            backbone,
            [ExitSpec(**spec) for spec in config["exits"]],
            config["num_classes"],
            pool=config["pool"],
            num_heads=config["num_heads"],
        )
        model.backbone_config = made
        set_layer_norm_eps(model, (made or {}).get("layer_norm_eps"))
        model.class_names = config.get("class_names")
        if config.get("policy"):
            model.policy = policies.from_dict(config["policy"])
        if config.get("certificate"):
            model.certificate = Certificate.from_dict(config["certificate"])
        return model

    def set_layer_norm_eps(self, eps: float) -> None:
        """Give every LayerNorm this eps, and keep it with the model: it is no argument of timm's."""
        set_layer_norm_eps(self, eps)
        if self.backbone_config is not None:
            self.backbone_config["layer_norm_eps"] = eps

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and, if there is none, a model card `README.md`.

        Each file appears whole or not at all.

        Args:
            folder: where to.
            push_to_hub: also upload to the Hugging Face hub, see `push_to_hub`.
            repo_id: name there, "user/model"; None takes the folder's name.
            model_card_kwargs: values for the model card beyond what the model says of itself.
            **push_to_hub_kwargs: go to `push_to_hub`.

        Returns:
            The address of the upload, if there was one.
        """
        from lgvit_fast.checkpoints import hub

        hub.save_pretrained(self, folder, **(model_card_kwargs or {}))
        if not push_to_hub:
            return None
        repo_id = repo_id or os.path.basename(os.path.abspath(folder))
        return hub.push_to_hub(self, repo_id, folder, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face hub; options as of `checkpoints.hub.push_to_hub`."""
        from lgvit_fast.checkpoints import hub

        return hub.push_to_hub(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        backbone: nn.Module | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Make the model that `save_pretrained` wrote, in eval mode on the CPU.

        Args:
            folder: where it was written, or its name on the Hugging Face hub, "user/model".
            backbone: a timm model of the same shape; needed only where the saved one was not made by
                `timm.create_model` with plain arguments and so cannot be made again by name.
            revision: on the hub: branch, tag or commit.
            token: for a private repository on the hub.
            cache_dir: where files from the hub are kept.
            force_download: fetch them anew.
            local_files_only: take them from there, without asking the hub.

        Raises:
            FileNotFoundError: no such folder, a file is missing in it, or the hub does not have it or
                cannot be reached.
            ValueError: another format, a damaged file, or weights that do not fit, naming the keys.
        """
        from lgvit_fast.checkpoints import hub

        return cast(
            "Self",
            hub.load_pretrained(
                cls,
                folder,
                backbone,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            ),
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of logits: autocast's where it is on, else the heads' own."""
        parameter = next(self.exit_heads.parameters())
        if torch.is_autocast_enabled(parameter.device.type):
            return torch.get_autocast_dtype(parameter.device.type)
        return parameter.dtype

    def _backbone_grad(self) -> AbstractContextManager[object]:
        """No gradients for a frozen backbone: its activations need not be kept."""
        return torch.no_grad() if self._backbone_frozen else nullcontext()

    @property
    def _heads(self) -> list[ExitHead]:
        return cast(list[ExitHead], list(self.exit_heads))

    def fitting(self, policy: Policy) -> Policy:
        """The policy itself; ValueError unless it is one and fits the number of exits."""
        if not isinstance(policy, Policy):
            raise ValueError(
                f"policy={policy!r}, expected a lgvit_fast policy such as Confidence(0.8)"
            )
        policy.check(len(self.exits))
        return policy


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    exits: int | Sequence[int] | Sequence[ExitSpec] | None = None,
    heads: str | Sequence[str] | None = None,
    pool: str = "subsample",
    exit_num_heads: int = 8,
    **timm_kwargs: Any,
) -> LGViT:
    """Make a timm model by name and give it early exits.

    Args:
        model_name: any timm ViT or DeiT, such as "vit_base_patch16_224".
        pretrained: let timm load its pretrained weights (needs the network or a cache).
        exits: see `LGViT`.
        heads: see `LGViT`.
        pool: see `LGViT`.
        exit_num_heads: attention heads of global heads (`num_heads` is the backbone's own).
        **timm_kwargs: go to `timm.create_model`: num_classes, img_size, depth, ...

    Raises:
        ValueError: no timm model of that name, or see `LGViT`.
    """
    if not timm.is_model(model_name):
        names = timm.list_models(exclude_filters="lgvit_*")
        family = model_name.split("_")[0]
        kin = [name for name in names if name.split("_")[0] == family]
        near = difflib.get_close_matches(model_name, kin or names, n=5, cutoff=0.4)
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise ValueError(f"timm has no model named {model_name!r}{hint}")
    backbone = make_backbone(model_name, pretrained, **timm_kwargs)
    return LGViT(backbone, exits, heads=heads, pool=pool, num_heads=exit_num_heads)


def _take_names_of_files(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Let `load_state_dict` take timm's names, too."""
    own = {
        key.removeprefix(prefix): state_dict.pop(key)
        for key in list(state_dict)
        if key.startswith(prefix)
    }
    state_dict.update({prefix + key: value for key, value in module_names(own).items()})
