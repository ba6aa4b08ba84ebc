"""Which exit sits where: positions and kinds of the heads, the published layouts among them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LAYOUTS", "ExitSpec", "default_heads", "default_layers", "resolve_exits"]

LAYOUTS = ("lgvit", "linear", "vit_ee", "conv", "attention", "mlp")

_HEAD = re.compile(
    r"(lph_full|lph_light|linear|conv|attention|mlp|vit_ee|gah(?=_))(?:_([1-9]\d*))?$"
)
_NUMBERED = ("gah", "vit_ee")


@dataclass(frozen=True)
class ExitSpec:
    """One exit.

    Attributes:
        layer: the block it reads, counted from 1.
        head: "lph_full", "lph_light" or "gah_r" with r the pooling stride, as in "gah_2"; or a plain
            one: "linear", "mlp", "conv", "attention", "vit_ee" ("vit_ee_m" with m the ratio of its
            perceptron, 4 by default).

    Raises:
        ValueError: an unknown head or a layer below 1.
    """

    layer: int
    head: str

    def __post_init__(self) -> None:
        match = _HEAD.match(self.head)
        if not match or (match[2] and match[1] not in _NUMBERED):
            known = ("lph_full", "lph_light", "gah_1", "gah_2", "gah_3", *LAYOUTS[1:])
            near = difflib.get_close_matches(self.head, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"head={self.head!r}, expected 'lph_full', 'lph_light', 'gah_r' such as 'gah_2', or one"
                f" of {', '.join(LAYOUTS[1:])}{hint}"
            )
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(f"layer={self.layer!r}, expected a block number from 1 on")

    @property
    def family(self) -> str:
        """The head's name without its number: "gah" for "gah_2"."""
        return self._match[1]

    @property
    def number(self) -> int | None:
        """The number in the head's name, if it has one."""
        return int(self._match[2]) if self._match[2] else None

    @property
    def kind(self) -> str:
        """ "local" for a perception head, "global" for an aggregation head, "plain" for a rival's."""
        return {"lph": "local", "gah": "global"}.get(self.head[:3], "plain")

    @property
    def stride(self) -> int:
        """Pooling stride of a global head, 1 for any other."""
        return (self.number or 1) if self.family == "gah" else 1

    @property
    def attends(self) -> bool:
        """Whether the head has attention heads."""
        return self.family in ("gah", "attention", "vit_ee")

    @property
    def _match(self) -> re.Match[str]:
        match = _HEAD.match(self.head)
        assert match is not None  # checked when made
        return match


def default_layers(
    num_blocks: int, count: int | None = None, depths: Sequence[int] = ()
) -> tuple[int, ...]:
    """The default placement of exits (paper section 4.1).

    In a columnar model: evenly spaced from a third of the depth to the last block but one; 12 blocks
    and 8 exits give 4 to 11. In a hierarchical one: from the end of the second stage, evenly over the
    last stage but one to its end, and the last block but one; Swin-B and 8 exits give 4, 7, ... 22, 23.
    Without a count there are 8 exits, or one after every such block of a shallower model.

    Args:
        num_blocks: L.
        count: how many exits.
        depths: blocks of each stage; empty or one for a model without stages.

    Raises:
        ValueError: more exits asked for than there are blocks before the last.
    """
    last = num_blocks - 1
    if last < 1:
        raise ValueError(f"a model of {num_blocks} blocks has no place for an early exit")
    staged = len(depths) > 2 and depths[-1] > 1
    first = sum(depths[:-2]) if staged else max(1, num_blocks // 3)
    if count is None:
        count = min(8, last - first + 1)
    if not 1 <= count <= last:
        raise ValueError(f"exits={count}, expected 1 to {last} for a model of {num_blocks} blocks")
    if count == 1:
        return ((first + last) // 2,)
    if staged and 3 <= count <= depths[-2] + 2:
        inner = count - 2  # the exits in the last stage but one
        return (first, *(first + -(-(i * depths[-2]) // inner) for i in range(1, count - 1)), last)
    first = min(first, last - count + 1)
    return tuple(first + round(i * (last - first) / (count - 1)) for i in range(count))


def default_heads(
    layers: Sequence[int], num_blocks: int, strides: tuple[int, int] = (2, 3)
) -> tuple[str, ...]:
    """The rule behind the published layouts: local heads first, global heads after.

    Of E exits the first E/2 (rounded down to an even number, at least 1) are local, half of these
    full; the rest are global, half of these with the smaller stride and the others with the larger. A
    single exit is local in the shallow half of the model and global in the deep half.

    Args:
        layers: the block of each exit, from 1.
        num_blocks: L.
        strides: of the global heads; published are 2 and 3, and 1 and 2 for Swin.
    """
    small, large = (f"gah_{stride}" for stride in strides)
    count = len(layers)
    if count == 1:
        return ("lph_full",) if 2 * layers[0] <= num_blocks else (small,)
    num_local = max(1, count // 2 - count // 2 % 2)
    num_global = count - num_local
    num_full, num_small = (num_local + 1) // 2, (num_global + 1) // 2
    return (
        *("lph_full",) * num_full,
        *("lph_light",) * (num_local - num_full),
        *(small,) * num_small,
        *(large,) * (num_global - num_small),
    )


def resolve_exits(
    exits: int | Sequence[int] | Sequence[ExitSpec] | None,
    heads: str | Sequence[str] | None,
    num_blocks: int,
    depths: Sequence[int] = (),
) -> tuple[ExitSpec, ...]:
    """Turn what a user wrote into a checked layout.

    Args:
        exits: None (default places), how many, the layers, or complete `ExitSpec`s.
        heads: the head of each exit; one name for all; "lgvit" or None for the default rule.
        num_blocks: L, depth of the backbone.
        depths: blocks of each stage of a hierarchical backbone.

    Raises:
        ValueError: exits beyond L - 1, unsorted or repeated, none at all, or heads of another length.
    """
    given: Sequence[int | ExitSpec]
    if exits is None or isinstance(exits, int):
        given = default_layers(num_blocks, exits, depths)
    else:
        given = list(exits)
    if all(isinstance(e, ExitSpec) for e in given) and given:
        if heads is not None:
            raise ValueError("heads must be None when exits are ExitSpecs, which name their heads")
        specs = tuple(e for e in given if isinstance(e, ExitSpec))
    else:
        layers = [e for e in given if isinstance(e, int) and not isinstance(e, bool)]
        if len(layers) != len(given) or not layers:
            raise ValueError(f"exits={exits!r}, expected block numbers (at least one) or ExitSpecs")
        if heads is None or heads == "lgvit":
            names = default_heads(layers, num_blocks, (1, 2) if len(depths) > 1 else (2, 3))
        else:
            names = (heads,) * len(layers) if isinstance(heads, str) else tuple(heads)
        if len(names) != len(layers):
            raise ValueError(f"heads has {len(names)} entries for {len(layers)} exits: {names}")
        specs = tuple(ExitSpec(layer, name) for layer, name in zip(layers, names, strict=True))
    order = [spec.layer for spec in specs]
    if order != sorted(set(order)):
        raise ValueError(f"exits={order}, expected increasing block numbers without repetition")
    if order[-1] >= num_blocks:
        raise ValueError(
            f"exits={order}, expected blocks 1 to {num_blocks - 1}: the model has {num_blocks} blocks"
            " and the last one's exit is its own classifier"
        )
    return specs
