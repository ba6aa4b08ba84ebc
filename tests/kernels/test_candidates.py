"""Every candidate that tuning may pick, and every tile that a launcher picks, against the reference.

Sizes are no multiples of a tile: less than one, or one and a part of the next. `tests/fuzz` runs more.
"""

from itertools import product

import pytest
import torch

from lgvit_fast.kernels import attention, common, exit_step
from lgvit_fast.kernels.tuning import INTERPRETED
from lgvit_fast.ops.exit_step import ExitRule, RuleKind, exit_step_reference
from tests.kernels import test_attention
from tests.kernels import test_exit_step as steps
from tests.kernels.candidates import TUNED, Case, Draw, cases


def test_every_candidate_of_every_tuned_kernel_is_run() -> None:
    run = {(name, *c.config.kwargs.items()) for c in cases() for name in c.kernels}
    assert run == {(name, *c.kwargs.items()) for name, k in TUNED.items() for c in k.configs}
    assert len(TUNED) == 6


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_candidate_gives_the_numbers_of_the_reference(case: Case) -> None:
    case.run(torch.float32 if INTERPRETED else torch.bfloat16, Draw())


def test_projections_have_tiles_of_64_and_128_rows() -> None:
    sizes = [(rows, width) for rows in (1, 100, 10_000, 10**6) for width in (8, 192, 768, 4096)]
    assert {common.projection_rows(*size) for size in sizes} == {64, 128}


def exit_tiles() -> dict[tuple[int, int], tuple[int, int, torch.dtype]]:
    """For each tile that an exit step may have, a small size that is no multiple of it."""
    found: dict[tuple[int, int], tuple[int, int, torch.dtype]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (1, *(16 * n + 1 for n in range(1, 300))):
            for width in (8, 24, 40, 72, 136, 264):
                tile = exit_step.tile_of(classes, width, dtype)
                found.setdefault(tile, (classes + 2, width, dtype))
    return found


@pytest.mark.parametrize(("tile", "size"), exit_tiles().items(), ids=str)
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_every_tile_of_an_exit_step(tile, size, split, monkeypatch) -> None:
    classes, width, dtype = size
    monkeypatch.setattr(exit_step, "FEW_PROGRAMS", 10**6 if split else 0)
    arguments = steps.make(3, 1, 1, width, classes, dtype)
    assert exit_step.tile_of(classes, width, dtype) == tile
    step = exit_step.exit_step(**arguments, rule=(3, 0.0, 1), state=steps.fresh(3))
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    rule = ExitRule(RuleKind.NEVER)
    expected = exit_step_reference(**exact, rule=rule, state=steps.fresh(3)).logits
    assert (step.logits - expected).norm() <= steps.ERROR[dtype] * expected.norm()
    assert step.prediction.tolist() == step.logits.argmax(1).tolist() and step.leave.all()


def attention_tiles() -> dict[tuple[int, ...], tuple[int, int, torch.dtype]]:
    """For each pair of tiles, forward and backward, the least tokens and channels that have it."""
    found: dict[tuple[int, ...], tuple[int, int, torch.dtype]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for count, width in product((3, 17, 33, 65), (3, 17, 33, 65)):
            qkv = torch.empty(1, count, 3 * width, dtype=dtype, device="meta")
            shapes = [attention._launch(qkv, 1, use)[1] for use in ("forward", "backward")]
            tile = tuple(int(shape[name] or 0) for shape in shapes for name in ("BLOCK", "BLOCK_D"))
            found.setdefault(tile, (count, width, dtype))
    return found


@pytest.mark.parametrize(("tile", "size"), attention_tiles().items(), ids=str)
def test_every_tile_of_attention(tile: tuple[int, ...], size: tuple[int, int, torch.dtype]) -> None:
    count, width, dtype = size
    test_attention.check(test_attention.make(1, count, 3 * width, dtype=dtype), 1)
