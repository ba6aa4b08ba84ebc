"""Saving a model as safetensors and json, making it again, and the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from lgvit_fast.checkpoints.files import (
    load_json,
    load_strictly,
    load_weights,
    require_fit,
    save_json,
    save_text,
    save_weights,
)
from lgvit_fast.checkpoints.fingerprint import fingerprint
from lgvit_fast.checkpoints.fit import build_fitting, malformed
from lgvit_fast.checkpoints.header import read_header
from lgvit_fast.model_config import check_config
from lgvit_fast.parameter_names import file_names

if TYPE_CHECKING:
    from lgvit_fast.model import LGViT

__all__ = ["certifies", "load_pretrained", "model_card", "push_to_hub", "save_pretrained"]

_logger = logging.getLogger("lgvit_fast")

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ backbone }} with early exits

An image classifier ({{ num_classes }} classes) that answers easy images after a few of its
{{ num_blocks }} blocks ([LGViT](https://arxiv.org/abs/2308.00255)), made with lgvit_fast.

| exit after block | head |
|---|---|
{% for layer, head in exits %}| {{ layer }} | {{ head }} |
{% endfor %}
Saved exit policy: `{{ policy }}`.{% if certificate %} {{ certificate }}{% endif %}

```python
import lgvit_fast

model = lgvit_fast.LGViT.from_pretrained("{{ repo_id | default('user/model', true) }}")
result = model.infer(images)  # logits, and the exit at which each image left
```
"""


def save_pretrained(model: LGViT, folder: str | os.PathLike[str], **card_values: Any) -> None:
    """Write `config.json`, `model.safetensors` and, if there is none, a model card `README.md`.

    Each file appears whole or not at all.

    Args:
        model: what to save.
        folder: where to.
        **card_values: values for the model card beyond what the model says of itself.
    """
    folder = Path(folder)
    config = model.get_config()
    if not certifies(model):
        _logger.warning("the weights changed since the certificate was made: it is not saved")
        config["certificate"] = None
    save_weights(folder / _WEIGHTS, file_names(model.state_dict()), {"format": config["format"]})
    save_json(folder / _CONFIG, config)
    if not (folder / _CARD).exists():
        save_text(folder / _CARD, str(model_card(model, **card_values)))


def push_to_hub(
    model: LGViT,
    repo_id: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
    **card_values: Any,
) -> str:
    """Upload a model to the Hugging Face hub.

    Args:
        model: what to upload.
        repo_id: name there, "user/model"; created if there is none.
        folder: where it was saved; None saves it to a temporary folder first.
        token: to write with; None takes the one of `hf auth login`.
        private: for a repository that is created; None takes the account's default.
        revision: branch to commit to.
        commit_message: of the upload.
        create_pr: open a pull request instead.
        **card_values: values for the model card beyond what the model says of itself.

    Returns:
        The address of the upload.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            save_pretrained(model, temporary, repo_id=repo_id, **card_values)
            return push_to_hub(
                model,
                repo_id,
                temporary,
                token=token,
                private=private,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
    hub = HfApi(token=token, library_name="lgvit_fast")
    name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(
        hub.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    )


def model_card(model: LGViT, **values: Any) -> ModelCard:
    """A model card that says what the exits are and how to use the model."""
    data = ModelCardData(
        library_name="lgvit_fast",
        pipeline_tag="image-classification",
        tags=["early-exit", "vision-transformer", "lgvit"],
    )
    facts = {
        "backbone": (model.backbone_config or {}).get("name") or type(model.backbone).__name__,
        "num_blocks": model.num_blocks,
        "num_classes": model.num_classes,
        "exits": [(spec.layer, spec.head) for spec in model.exits],
        "policy": str(model.policy),
        "certificate": None if model.certificate is None else str(model.certificate),
    }
    card: ModelCard = ModelCard.from_template(data, template_str=_TEMPLATE, **{**facts, **values})
    return card


def load_pretrained(
    model_class: type[LGViT],
    folder: str | os.PathLike[str],
    backbone: nn.Module | None = None,
    **hub_options: Any,
) -> LGViT:
    """Make the model that `save_pretrained` wrote; see `LGViT.from_pretrained`."""
    place = Path(folder)
    if not place.exists() and _HUB_NAME.fullmatch(str(folder)):
        place = _download(str(folder), **hub_options)
    config, weights = load_json(place / _CONFIG), str(place / _WEIGHTS)
    with malformed(place / _CONFIG):
        check_config(config)
        held = read_header(weights)
        _check_depth(config, len(held.shapes))

    def build() -> LGViT:
        with malformed(place / _CONFIG):
            return model_class.from_config(config, backbone)

    def check(model: LGViT) -> None:
        require_fit(model, held, weights)

    if backbone is None:
        model = build_fitting(build, check, place / _CONFIG)
    else:  # which is there already, in whatever memory it takes
        model = build()
        check(model)
    load_strictly(model, load_weights(weights), weights)
    if not certifies(model):
        raise ValueError(
            f"{place / _CONFIG} holds a certificate of other weights than {weights} has;"
            " calibrate again, or take the certificate out"
        )
    return model.eval()


def certifies(model: LGViT) -> bool:
    """Whether the model's certificate, if it names weights, is of the weights it has."""
    certificate = model.certificate
    if certificate is None or certificate.model is None:
        return True
    return certificate.model == fingerprint(model.state_dict())


def _check_depth(config: dict[str, Any], tensors: int) -> None:
    """Refuse more blocks than the weights can be of: even without storage a block takes time."""
    args = (config["backbone"] or {}).get("args", {})
    depth, depths = args.get("depth") or 0, args.get("depths") or 0
    blocks = max(depth, sum(depths) if isinstance(depths, list) else depths)
    if 4 * blocks > tensors:  # a block has two norms, attention and a perceptron at least
        raise ValueError(f"the config has {blocks} blocks, but the weights only {tensors} tensors")


def _download(name: str, **options: Any) -> Path:
    """The folder in the hub's cache that holds a model's two files."""
    try:
        files = [hf_hub_download(name, file, **options) for file in (_CONFIG, _WEIGHTS)]
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give it ({reason}); offline, give"
            " a folder that save_pretrained wrote, or a model that is in the cache"
        ) from error
    return Path(files[0]).parent
