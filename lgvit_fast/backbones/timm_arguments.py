"""The arguments of timm models that a file may set: sizes, rates, switches and names of layers.

A file from elsewhere must not choose what is opened, fetched or unpickled, so everything else that
`timm.create_model` takes (paths, addresses, pretrained weights, configurations) is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import timm

from lgvit_fast.rules import Rule, choice, flag, integer, number, one_or_list, require, word

__all__ = ["ARGUMENTS", "check_arguments", "check_data", "check_description"]

_SIZE = one_or_list(integer(1, 8192))
_RATE = number(0, 1)
_FACTOR = number(-1e6, 1e6)

ARGUMENTS: dict[str, Rule] = {
    # sizes
    "img_size": _SIZE,
    "patch_size": one_or_list(integer(1, 512)),
    "window_size": one_or_list(integer(1, 512), depth=2),
    "ref_feat_shape": _SIZE,
    "in_chans": integer(1, 1024),
    "num_classes": integer(0, 10_000_000),
    "embed_dim": integer(1, 65_536),
    "depth": integer(1, 512),
    "depths": one_or_list(integer(1, 512)),
    "num_heads": one_or_list(integer(1, 1024)),
    "num_kv_heads": one_or_list(integer(1, 1024)),
    "attn_pool_num_heads": integer(1, 1024),
    "head_dim": integer(1, 65_536),
    "reg_tokens": integer(0, 4096),
    "num_reg_tokens": integer(0, 4096),
    "swiglu_align_to": integer(0, 65_536),
    "rope_mrope_section": one_or_list(integer(0, 65_536)),
    "mlp_ratio": number(0, 64),
    "attn_pool_mlp_ratio": number(0, 64),
    # rates
    "drop_rate": _RATE,
    "pos_drop_rate": _RATE,
    "patch_drop_rate": _RATE,
    "proj_drop_rate": _RATE,
    "attn_drop_rate": _RATE,
    "drop_path_rate": _RATE,
    # numbers
    "init_values": _FACTOR,
    "head_init_scale": _FACTOR,
    "rope_grid_offset": _FACTOR,
    "rope_temperature": number(1e-6, 1e9),
    "rope_shift_coords": _FACTOR,
    "rope_jitter_coords": _FACTOR,
    "rope_rescale_coords": _FACTOR,
    # switches
    **dict.fromkeys(
        (
            "qkv_bias", "qkv_fused", "qk_norm", "proj_bias", "scale_attn_norm", "scale_mlp_norm",
            "scale_attn_inner", "scale_mlp", "swiglu_mlp", "attn_only_layer_scale", "class_token",
            "no_embed_class", "use_abs_pos_emb", "use_rot_pos_emb", "rope_rotate_half", "pre_norm",
            "final_norm", "fc_norm", "use_fc_norm", "use_post_norm", "use_pre_transformer_norm",
            "use_post_transformer_norm", "pool_include_prefix", "dynamic_img_size",
            "dynamic_img_pad", "strict_img_size", "always_partition", "fix_init",
        ),
        flag,
    ),
    # choices and names of layers, which timm looks up in tables
    "global_pool": choice("", "avg", "avgmax", "max", "token", "map", "prr"),
    "pos_embed": choice("", "none", "learn"),
    "weight_init": choice("", "skip", "reset", "jax", "jax_nlhb", "moco"),
    "rope_type": choice("", "none", "cat", "mixed", "dinov3", "mrope"),
    "rope_grid_indexing": choice("ij", "xy"),
    "attn_type": word,
    "act_layer": word,
    "norm_layer": word,
    "embed_norm_layer": word,
    "attn_layer": word,
}  # fmt: skip

# How images are prepared, in the words of timm's configurations of weights.
_DATA: dict[str, Rule] = {
    "mean": one_or_list(_FACTOR),
    "std": one_or_list(number(1e-6, 1e6)),
    "interpolation": word,
    "crop_pct": number(0.01, 2),
}

_NAME = re.compile(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_]{1,100})?")


def check_arguments(args: Mapping[str, Any], where: str) -> None:
    """Refuse arguments that a file must not set.

    Args:
        args: of `timm.create_model`.
        where: what holds them, for the error.

    Raises:
        ValueError: an argument that is not in `ARGUMENTS`, or one of another type or range.
    """
    for key in args:
        if key not in ARGUMENTS:
            near = difflib.get_close_matches(str(key), ARGUMENTS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"{where} holds {str(key)[:80]!r}{hint}, which no file may set: only sizes, rates,"
                " switches and names of layers are taken from a file; make the model in your own"
                " code and give it as backbone="
            )
    require(args, ARGUMENTS, f"{where}.")


def check_data(data: Any, where: str) -> None:
    """Refuse what does not say how images are prepared: mean, std, interpolation, crop_pct.

    Raises:
        ValueError: another entry, or one of another type or range.
    """
    unknown = [key for key in data if key not in _DATA] if isinstance(data, Mapping) else [data]
    if unknown:
        raise ValueError(f"{where} holds {repr(unknown[0])[:80]}, expected {', '.join(_DATA)}")
    require(data, _DATA, f"{where}.")


def check_description(made: Any) -> None:
    """Refuse what does not describe a timm model by a plain name and allowed arguments.

    Args:
        made: what `describe_backbone` gave, from a file.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(made, Mapping) or not isinstance(made.get("args"), Mapping):
        raise ValueError(f"backbone is {repr(made)[:80]}, expected a name and args")
    name = made.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("lgvit_"):
        raise ValueError(
            f"backbone.name is {repr(name)[:80]}, expected the plain name of a timm model, such as"
            " 'vit_base_patch16_224'"
        )
    if not timm.is_model(name):
        raise ValueError(
            f"backbone.name is {name!r}, which this timm ({timm.__version__}) does not know; give"
            " backbone="
        )
    check_arguments(made["args"], "backbone.args")
    require(made, {"layer_norm_eps": number(0, 1)}, "backbone.")
    check_data(made.get("data") or {}, "backbone.data")
