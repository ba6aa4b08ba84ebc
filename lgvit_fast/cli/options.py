"""What several commands share: their options, and how these become a model and a policy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgvit_fast.arguments import UsageError, count, numbers

if TYPE_CHECKING:
    from lgvit_fast.deploy import Deployed
    from lgvit_fast.model import LGViT
    from lgvit_fast.policies import Policy

__all__ = [
    "MODEL_HELP",
    "ON_THE_HUB",
    "POLICIES",
    "add_compute",
    "add_policy",
    "autocast_of",
    "is_exported",
    "load_exported",
    "load_model",
    "policy_from",
]

POLICIES = ("confidence", "entropy", "patience", "patient_confident")
ON_THE_HUB = "hf-hub:"  # before the name of a model on the Hugging Face hub, as in timm


MODEL_HELP = "a saved model, an exported one, or hf-hub:USER/MODEL"


def add_policy(
    parser: argparse.ArgumentParser,
    choices: Sequence[str] = POLICIES,
    about: str = "default: the one saved with the model",
) -> None:
    """Add --policy, --threshold and --patience."""
    group = parser.add_argument_group("exit policy")
    group.add_argument("--policy", choices=choices, help=about)
    group.add_argument(
        "--threshold",
        type=numbers,
        metavar="T[,T...]",
        help="of confidence (0 to 1) or entropy (nats): one number, or one per exit",
    )
    group.add_argument(
        "--patience", type=count, metavar="N", help="exits in a row, of the patient policies"
    )


def policy_from(
    args: argparse.Namespace, model: LGViT | Deployed, default: str | None = None
) -> Policy | None:
    """The policy that the arguments name, None if they name none.

    Args:
        args: parsed arguments, with those of `add_policy`.
        model: what the policy is for.
        default: the policy that a threshold alone belongs to; None asks for `--policy`.

    Raises:
        UsageError: numbers out of range, of another policy, or for another number of exits.
    """
    from lgvit_fast.policies import KINDS

    given = {"threshold": args.threshold, "patience": args.patience}
    given = {name: value for name, value in given.items() if value is not None}
    name_of_policy = args.policy or (default if given else None)
    if name_of_policy is None:
        if given:
            raise UsageError(f"--{next(iter(given))} needs --policy")
        return None
    for name, others in (
        ("threshold", ("patience",)),
        ("patience", ("confidence", "entropy")),
    ):
        if name in given and name_of_policy in others:
            raise UsageError(f"--policy {name_of_policy} takes no --{name}")
    exits = len(model.exits)
    if given.get("patience", 0) > exits:
        raise UsageError(
            f"--patience {args.patience}: the model has {exits} exits, so no image would leave early"
        )
    try:
        policy = KINDS[name_of_policy](**given)
        policy.check(exits)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return policy


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Add --device and --precision."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="autocast to bf16 or fp16 (default: fp32)",
    )


def autocast_of(args: argparse.Namespace, model: LGViT) -> AbstractContextManager[Any] | None:
    """The autocast that --precision asks for, None for fp32."""
    import torch

    if args.precision == "fp32":
        return None
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float16
    return torch.autocast(next(model.parameters()).device.type, dtype)


def load_model(folder: str, device: str | None) -> LGViT:
    """A saved model, or `hf-hub:user/model`, in eval mode on a device.

    Raises:
        UsageError: no such device.
        FileNotFoundError: no saved model there, or the hub cannot be reached.
        ValueError: a damaged one, saying how.
    """
    name = folder.removeprefix(ON_THE_HUB)
    missing = [n for n in ("config.json", "model.safetensors") if not (Path(folder) / n).is_file()]
    if missing and name == folder:
        raise FileNotFoundError(
            f"no saved model in {folder!r}: {' and '.join(missing)} not found (training saves one in"
            " OUTPUT/stage1/best and OUTPUT/stage2/best; a model on the Hugging Face hub is"
            " hf-hub:user/model)"
        )
    import torch  # after what can be said without it

    from lgvit_fast.inference.untrained import warn_if_untrained
    from lgvit_fast.model import LGViT

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device {device}: {error}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this torch sees no GPU")
    model = LGViT.from_pretrained(name).to(place)
    warn_if_untrained(model)
    return model


def is_exported(folder: str) -> bool:
    """Whether a folder holds what `lgvit-fast export` wrote."""
    return Path(folder, "manifest.json").is_file()


def load_exported(args: argparse.Namespace) -> Deployed:
    """The exported model in the folder `args.model`. Does not need torch.

    Raises:
        UsageError: --device or --precision, which an exported model has no choice of.
        RuntimeError: no runtime is installed.
        ValueError: a damaged export, saying how.
    """
    if args.device not in (None, "cpu") or args.precision != "fp32":
        raise UsageError(
            f"{args.model} is exported: it runs on the CPU in the precision it was exported with;"
            " leave out --device and --precision"
        )
    from lgvit_fast.deploy import Deployed

    return Deployed(args.model)
