"""The global head's kernels against the reference in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lgvit_fast.heads import ExitHead, ExitSpec
from lgvit_fast.ops import backend
from lgvit_fast.ops.exit_step import ExitRule, RuleKind
from lgvit_fast.ops.gah import gah_pool, gah_pool_reference
from tests.helpers import randomize
from tests.kernels.device import far_apart, generator, moved

ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(
    batch: int, grid: tuple[int, int], prefix: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    g = generator(0)
    tokens = torch.randn(batch, prefix + grid[0] * grid[1], width, generator=g).to(dtype)
    weight = (1.5 * torch.randn(2 * width, width, generator=g) / width**0.5).to(dtype)
    return tokens, weight


def check(tokens: Tensor, grid: tuple[int, int], prefix: int, weight: Tensor, *how: Any) -> None:
    expected = gah_pool_reference(tokens.double(), grid, prefix, weight.double(), *how)
    pooled = gah_pool(tokens, grid, prefix, weight, *how, backend="triton")
    assert pooled.shape == expected.shape and pooled.dtype == tokens.dtype
    assert (pooled.double() - expected).norm() <= ERROR[tokens.dtype] * expected.norm()


@pytest.mark.parametrize("pool", ["subsample", "average"])
@pytest.mark.parametrize(
    ("batch", "grid", "prefix", "width", "heads", "stride"),
    [
        (3, (1, 1), 0, 64, 2, 2),
        (2, (7, 7), 1, 192, 4, 1),
        (3, (13, 15), 2, 96, 4, 2),
        (1, (14, 14), 1, 192, 2, 3),
        (1, (5, 3), 0, 64, 1, 4),
    ],
    ids=["1 token", "7x7 by 1", "13x15 by 2", "14x14 by 3", "window wider than grid"],
)
def test_matches_reference(
    batch: int, grid: tuple[int, int], prefix: int, width: int, heads: int, stride: int, pool: str
) -> None:
    tokens, weight = make(batch, grid, prefix, width)
    check(tokens, grid, prefix, weight, heads, stride, pool)


@pytest.mark.parametrize(
    ("grid", "stride", "pool"),
    [((9, 13), 1, "subsample"), ((24, 24), 2, "average"), ((24, 24), 1, "subsample")],
    ids=["117 tokens", "144 averaged", "576 tokens"],
)
def test_more_tokens_than_a_tile(grid: tuple[int, int], stride: int, pool: str) -> None:
    tokens, weight = make(1, grid, 1, 64)
    check(tokens, grid, 1, weight, 2, stride, pool)


@pytest.mark.parametrize(
    ("batch", "heads", "group", "dtype"),
    [(17, 2, 1, torch.float32), (32, 4, 2, torch.float32), (48, 3, 3, torch.bfloat16)],
    ids=["one", "half", "all"],
)
def test_programs_that_own_several_heads(
    batch: int, heads: int, group: int, dtype: torch.dtype
) -> None:
    from lgvit_fast.kernels.gah import heads_of_a_program

    assert heads_of_a_program(batch, heads) == group
    tokens, weight = make(batch, (3, 3), 1, 36, dtype)
    check(tokens, (3, 3), 1, weight, heads, 2, "subsample")


def test_heads_of_a_program_divide_the_heads() -> None:
    from lgvit_fast.kernels.gah import heads_of_a_program

    found = [heads_of_a_program(batch, 12) for batch in (1, 31, 32, 80, 256, 8192)]
    assert found == [1, 1, 2, 4, 12, 12]
    assert heads_of_a_program(8192, 17) == 1


@pytest.mark.parametrize("pool", ["subsample", "average"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype, pool: str) -> None:
    tokens, weight = make(2, (7, 9), 1, 192, dtype)
    check(tokens, (7, 9), 1, weight, 2, 2, pool)


@pytest.mark.parametrize("pool", ["subsample", "average"])
def test_strided_tokens(pool: str) -> None:
    tokens, weight = make(6, (5, 4), 1, 128)
    weight = weight[:128, :64]
    check(tokens[::2, :, ::2], (5, 4), 1, weight, 2, 2, pool)
    turned = tokens[..., :64].transpose(0, 1).contiguous().transpose(0, 1)
    check(turned, (5, 4), 1, weight, 2, 2, pool)


def test_channels_that_lie_far_apart() -> None:
    _, weight = make(1, (2, 3), 1, 6, torch.bfloat16)
    check(far_apart(2, 7, 6), (2, 3), 1, weight, 2, 1, "subsample")


def test_large_scores_do_not_overflow() -> None:
    tokens, weight = make(1, (9, 9), 0, 64)
    pooled = gah_pool(30 * tokens, (9, 9), 0, weight, 2, 1, backend="triton")
    assert pooled.isfinite().all()


def test_no_images() -> None:
    tokens, weight = make(0, (4, 4), 1, 64)
    assert gah_pool(tokens, (4, 4), 1, weight, backend="triton").shape == (0, 8, 64)


def test_only_what_is_asked_for_is_read() -> None:
    tokens, weight = make(2, (4, 4), 3, 64)
    tokens[:, :3] = float("nan")
    tokens[:, 3:].unflatten(1, (4, 4))[:, 1::2] = float("nan")  # rows that stride 2 leaves out
    assert gah_pool(tokens, (4, 4), 3, weight, 8, 2, backend="triton").isfinite().all()


def test_compiled_call_is_one_node() -> None:
    tokens, weight = make(2, (3, 5), 1, 64)

    def run(x: Tensor) -> Tensor:
        return gah_pool(x * 1.0, (3, 5), 1, weight, backend="triton") + 1

    compiled: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), run(tokens))


def test_operator_registration() -> None:
    tokens, weight = make(2, (3, 5), 1, 64)
    for x in (tokens, tokens.transpose(0, 1).clone().transpose(0, 1)):
        arguments = (x, 3, 5, 1, weight, 1, 2, "subsample")
        torch.library.opcheck(torch.ops.lgvit_fast.gah_pool_triton.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 7}, "num_heads is 7"),
        ({"stride": 0}, "stride is 0"),
        ({"pool": "max"}, "pool is 'max'"),
        ({"qk_weight": torch.zeros(64, 64)}, "qk_weight has shape"),
        ({"qk_weight": torch.zeros(128, 64, dtype=torch.float16)}, "qk_weight is torch.float16"),
        ({"num_prefix_tokens": 2}, "rows an image"),
    ],
    ids=["heads", "stride", "pool", "shape", "dtype", "grid"],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    from lgvit_fast.kernels.gah import gah_pool as launch

    tokens, weight = make(1, (4, 4), 1, 64)
    arguments = {"patch_grid": (4, 4), "num_prefix_tokens": 1, "qk_weight": weight, "num_heads": 8}
    with pytest.raises(ValueError, match=message):
        launch(tokens, **(arguments | {"stride": 2, "pool": "subsample"} | moved(change)))


def test_a_head_of_many_channels() -> None:
    tokens, weight = make(1, (2, 2), 0, 512)
    check(tokens, (2, 2), 0, weight, 1, 1, "subsample")


@pytest.mark.parametrize("pool", ["subsample", "average"])
@pytest.mark.parametrize("classes", [2, 9, 10, 1000])
@pytest.mark.parametrize(("grid", "stride"), [((5, 7), 2), ((4, 4), 1), ((14, 14), 3)], ids=str)
def test_an_exit_equals_its_training_form(
    grid: tuple[int, int], stride: int, classes: int, pool: str
) -> None:
    torch.manual_seed(0)
    head = ExitHead(ExitSpec(1, f"gah_{stride}"), 64, classes, 1, 1, 8, pool)
    randomize(head)
    head.eval().prepare(torch.float32)
    tokens, state = torch.randn(2, 1 + grid[0] * grid[1], 64), torch.zeros(2, 2, dtype=torch.int32)
    with torch.no_grad():
        expected, _ = head(tokens, grid)
        with backend("triton"):
            logits = head.step(tokens, grid, ExitRule(RuleKind.NEVER), state).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
