"""Names in timm's registry: `timm.create_model("lgvit_base_patch16_224")` makes an `LGViT`.

`pretrained=True` loads timm's weights of the backbone; the exits are untrained all the same. Importing
this module registers the names; `lgvit_fast` does so as soon as timm is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

__all__ = ["MODELS"]

MODELS = {
    **{
        f"lgvit_{size}_patch16_224": f"vit_{size}_patch16_224"
        for size in ("tiny", "small", "base", "large")
    },
    **{
        f"lgvit_deit_{size}_distilled_patch16_224": f"deit_{size}_distilled_patch16_224"
        for size in ("tiny", "small", "base")
    },
    **{
        f"lgvit_swin_{size}_patch4_window7_224": f"swin_{size}_patch4_window7_224"
        for size in ("tiny", "small", "base", "large")
    },
}


def _entry(name: str, backbone: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from lgvit_fast.model import create_model

        if kwargs.get("pretrained_cfg") is None:
            kwargs.pop("pretrained_cfg", None)
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        if kwargs.get("features_only"):  # features of the blocks: no exit has a part in them
            return timm.create_model(backbone, pretrained, **kwargs)
        return create_model(backbone, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{backbone} with early exits, see `lgvit_fast.create_model`."
    return create


# timm's registry looks for the configurations under this name in the module of an entry.
default_cfgs = generate_default_cfgs(
    {name: cfg for name, of in MODELS.items() if (cfg := get_pretrained_cfg(of)) is not None}
)
for _name, _backbone in MODELS.items():
    register_model(_entry(_name, _backbone))
