"""Which exit sits where: positions and kinds of the heads, the published layouts among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ExitSpec", "default_heads", "default_layers", "resolve_exits"]

_GAH = re.compile(r"gah_([1-9]\d*)$")


@dataclass(frozen=True)
class ExitSpec:
    """One exit.

    Attributes:
        layer: the block it reads, counted from 1.
        head: "lph_full", "lph_light" or "gah_r" with r the pooling stride, as in "gah_2".

    Raises:
        ValueError: an unknown head or a layer below 1.
    """

    layer: int
    head: str

    def __post_init__(self) -> None:
        if self.head not in ("lph_full", "lph_light") and not _GAH.match(self.head):
            raise ValueError(
                f"head={self.head!r}, expected 'lph_full', 'lph_light' or 'gah_r' such as 'gah_2'"
            )
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(f"layer={self.layer!r}, expected a block number from 1 on")

    @property
    def kind(self) -> str:
        """ "local" for a perception head, "global" for an aggregation head."""
        return "local" if self.head.startswith("lph") else "global"

    @property
    def stride(self) -> int:
        """Pooling stride of a global head, 1 for a local one."""
        match = _GAH.match(self.head)
        return int(match[1]) if match else 1


def default_layers(num_blocks: int, count: int | None = None) -> tuple[int, ...]:
    """Evenly spaced exits from a third of the depth to the last block but one.

    12 blocks and 8 exits give 4 to 11, the published ViT-B layout (paper section 4.1). Without a
    count there are 8 exits, or one after every such block of a shallower model.

    Raises:
        ValueError: more exits asked for than there are blocks before the last.
    """
    last = num_blocks - 1
    if last < 1:
        raise ValueError(f"a model of {num_blocks} blocks has no place for an early exit")
    first = max(1, num_blocks // 3)
    if count is None:
        count = min(8, last - first + 1)
    if not 1 <= count <= last:
        raise ValueError(f"exits={count}, expected 1 to {last} for a model of {num_blocks} blocks")
    if count == 1:
        return ((first + last) // 2,)
    first = min(first, last - count + 1)
    return tuple(first + round(i * (last - first) / (count - 1)) for i in range(count))


def default_heads(layers: Sequence[int], num_blocks: int) -> tuple[str, ...]:
    """The rule behind the published layouts: local heads first, global heads after.

    Of E exits the first E/2 (rounded down to an even number, at least 1) are local, half of these
    full; the rest are global, half of these with stride 2 and the others with stride 3. A single
    exit is local in the shallow half of the model and global in the deep half.
    """
    count = len(layers)
    if count == 1:
        return ("lph_full",) if 2 * layers[0] <= num_blocks else ("gah_2",)
    num_local = max(1, count // 2 - count // 2 % 2)
    num_global = count - num_local
    full, small = (num_local + 1) // 2, (num_global + 1) // 2
    return (
        *("lph_full",) * full,
        *("lph_light",) * (num_local - full),
        *("gah_2",) * small,
        *("gah_3",) * (num_global - small),
    )


def resolve_exits(
    exits: int | Sequence[int] | Sequence[ExitSpec] | None,
    heads: Sequence[str] | None,
    num_blocks: int,
) -> tuple[ExitSpec, ...]:
    """Turn what a user wrote into a checked layout.

    Args:
        exits: None (default places), how many, the layers, or complete `ExitSpec`s.
        heads: the head of each exit, or None for the default rule.
        num_blocks: L, depth of the backbone.

    Raises:
        ValueError: exits beyond L - 1, unsorted or repeated, none at all, or heads of another length.
    """
    given: Sequence[int | ExitSpec]
    if exits is None or isinstance(exits, int):
        given = default_layers(num_blocks, exits)
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
        names = default_heads(layers, num_blocks) if heads is None else tuple(heads)
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
