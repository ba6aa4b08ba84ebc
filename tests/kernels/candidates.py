"""Every program that a tuned kernel may run as, each by itself against the reference.

Candidates are those of the kernels' own tuning. To the interpreter those with the same constants are
one program; a GPU runs them all.

    TRITON_INTERPRET=1 python -m tests.kernels.candidates [cases] [seed]    random sizes and dtypes
"""

from __future__ import annotations

import pkgutil
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import triton

from lgvit_fast import kernels
from lgvit_fast.kernels import depthwise, gah, lph, tuning
from tests.kernels import test_depthwise, test_gah, test_lph

TUNED: dict[str, tuning.Tuned] = {
    name: value
    for found in pkgutil.iter_modules(kernels.__path__)
    for name, value in vars(import_module(f"lgvit_fast.kernels.{found.name}")).items()
    if isinstance(value, tuning.Tuned)
}


class Case(NamedTuple):
    """A candidate of a tuned kernel, or of several that run after one another, in one use of them."""

    kernels: tuple[str, ...]
    use: str
    config: triton.Config

    def __str__(self) -> str:
        constants = "x".join(map(str, self.config.kwargs.values()))
        warps = "" if tuning.INTERPRETED else f", {self.config.num_warps} warps"
        return f"{self.kernels[0].removesuffix('_kernel')}, {self.use}: {constants}{warps}"

    def run(self, dtype: torch.dtype, draw: Draw) -> None:
        """Compare with the reference; nothing but this candidate may run the kernels, and it must."""
        with ExitStack() as stack:
            for name in self.kernels:
                stack.enter_context(_only(TUNED[name], self.config))
            USES[self.kernels][self.use](dtype, draw)


def cases() -> list[Case]:
    """Each candidate of each tuned kernel in each use that `USES` has for it."""
    found = []
    for names, uses in USES.items():
        every = [config for name in names for config in TUNED[name].configs]
        told = [c.kwargs if tuning.INTERPRETED else c.all_kwargs() for c in every]
        unlike = {tuple(t.items()): c for t, c in zip(told, every, strict=True)}
        found += [Case(names, use, config) for use in uses for config in unlike.values()]
    return found


@contextmanager
def _only(kernel: tuning.Tuned, config: triton.Config) -> Iterator[None]:
    launched: list[dict[str, Any]] = []
    run, fits = kernel.fn.run, kernel.fits

    def spy(*args: Any, **named: Any) -> Any:
        launched.append(named)
        return run(*args, **named)

    def must_fit(config: triton.Config, args: dict[str, Any], device: tuning.Device) -> bool:
        if fits is not None and not fits(config, args, device):
            pytest.skip("the tuning does not pick it here")
        return True

    changes = [(kernel, "configs", [config]), (kernel, "chosen", {}), (kernel, "fits", must_fit)]
    if tuning.INTERPRETED:
        changes.append((kernel.fn, "run", spy))
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield
    if tuning.INTERPRETED:
        assert launched and all(config.kwargs.items() <= given.items() for given in launched)


class Draw:
    """Sizes: without a seed always the same small odd ones, which stand first; with one, any."""

    def __init__(self, seed: int | None = None) -> None:
        self.random = None if seed is None else random.Random(seed)

    def pick(self, first: int, *others: int) -> int:
        return first if self.random is None else self.random.choice((first, *others))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """That one, or with as many patches up to a power of two."""
        if self.random is not None and self.random.random() < 0.5:
            return width, height
        return height, width


Use = Callable[[torch.dtype, Draw], None]


def local_head(full: bool, rows: int) -> Use:
    """A projection in tiles of so many rows: 75 rows are more than one tile, or less."""

    def use(dtype: torch.dtype, draw: Draw) -> None:
        grid, prefix, batch = draw.grid(5, 5), draw.pick(1, 0, 2, 5), draw.pick(3, 1, 2, 6, 11)
        width = draw.pick(40 if full else 64, 8, 33, 65, 72, 128, 130, 192)
        with patch.object(lph, "projection_rows", lambda *size: rows):
            tokens, weights = test_lph.make(batch, grid, prefix, width, full, dtype)
            test_lph.check(tokens, grid, prefix, weights)

    return use


def local_pool(height: int, width: int) -> Use:
    """The depthwise step of a local head, on a grid so wide that BLOCK_W is another one."""

    def use(dtype: torch.dtype, draw: Draw) -> None:
        channels = draw.pick(40, 8, 33, 64, 72, 130)
        made = test_lph.make(draw.pick(1, 2, 5), (height, width), 1, channels, True, dtype)
        test_lph.check(made[0], (height, width), 1, made[1])

    return use


def convolution(width: int) -> Use:
    """All uses of the training kernels; the taps of all images summed in one program."""

    def use(dtype: torch.dtype, draw: Draw) -> None:
        grid, channels = (draw.pick(2, 1, 5), width), draw.pick(40, 8, 33, 64, 72)
        with patch.object(depthwise, "SPLIT_CHANNELS", channels):
            test_depthwise.check(
                test_depthwise.make(draw.pick(2, 1, 5), grid, channels, dtype), grid
            )

    return use


def global_head(rows: int, pool: str) -> Use:
    """A projection in tiles of so many rows: 72 pooled rows."""

    def use(dtype: torch.dtype, draw: Draw) -> None:
        grid, stride, batch = draw.grid(11, 11), draw.pick(2, 1, 3), draw.pick(2, 1, 3, 7)
        width, heads = (
            draw.pick(64 if pool == "average" else 40, 8, 36, 128, 132),
            draw.pick(1, 2, 4),
        )
        with patch.object(gah, "projection_rows", lambda *size: rows):
            tokens, weight = test_gah.make(batch, grid, 1, width, dtype)
            test_gah.check(tokens, grid, 1, weight, heads, stride, pool)

    return use


def global_pool(height: int, width: int, pool: str, group: int = 1) -> Use:
    """Attention and product; the grid says BLOCK_Q, and whether one tile holds it."""

    def use(dtype: torch.dtype, draw: Draw) -> None:
        grid, channels, heads = (
            draw.grid(height, width),
            draw.pick(72, 36, 132, 192),
            draw.pick(2, 4),
        )
        tokens, weight = test_gah.make(draw.pick(1, 3), grid, 1, channels, dtype)
        with patch.object(gah, "heads_of_a_program", lambda *size: group):
            stride = 1 if pool == "subsample" else 2
            test_gah.check(tokens, grid, 1, weight, heads, stride, pool)

    return use


USES: dict[tuple[str, ...], dict[str, Use]] = {
    ("lph_project_kernel",): {
        f"{'full' if full else 'light'}, {rows} rows": local_head(full, rows)
        for full in (True, False)
        for rows in (64, 128)
    },
    ("lph_depthwise_pool_kernel",): {
        f"{w} columns": local_pool(2, w) for w in (1, 2, 3, 7, 11, 19, 35)
    },
    ("depthwise_kernel", "depthwise_taps_kernel"): {
        f"{w} columns": convolution(w) for w in (1, 2, 3, 7, 11, 19, 35)
    },
    ("gah_project_kernel",): {
        f"{pool}, {rows} rows": global_head(rows, pool)
        for pool in ("subsample", "average")
        for rows in (64, 128)
    },
    ("gah_pool_kernel",): {
        "16": global_pool(3, 5, "subsample"),
        "32": global_pool(5, 5, "subsample"),
        "64": global_pool(7, 9, "subsample"),
        "two tiles": global_pool(7, 10, "subsample"),
        "16, averaged": global_pool(5, 7, "average"),
        "two tiles, averaged": global_pool(17, 15, "average"),
        "two heads a program": global_pool(1, 3, "subsample", group=2),
    },
}


def main() -> None:
    """Random cases; an error tells the case. Fresh memory is full of NaN, as in the tests."""
    torch.use_deterministic_algorithms(True)
    count, seed = (int(text) for text in (*sys.argv[1:], "100", "0")[:2])
    for number in range(seed, seed + count):
        draw = random.Random(number)
        case, dtype = draw.choice(cases()), draw.choice(list(test_lph.ERROR))
        try:
            case.run(dtype, Draw(number))
        except BaseException:
            print(f"{case}, {dtype}, seed {number}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
