"""The local head's kernels against the reference in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lgvit_fast import ops
from lgvit_fast.ops.lph import LPHWeights, lph_pool, lph_pool_reference
from lgvit_fast.ops.lph import _op as op
from tests.kernels.device import far_apart, generator, moved

ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(
    batch: int, grid: tuple[int, int], prefix: int, width: int, full: bool, dtype: torch.dtype
) -> tuple[Tensor, LPHWeights]:
    g = generator(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    tokens = normal(batch, prefix + grid[0] * grid[1], width).to(dtype)
    weights = LPHWeights((normal(width, width) / width**0.5).to(dtype), normal(width))
    if full:
        weights = weights._replace(
            scale=normal(width),
            shift=normal(width),
            depthwise_weight=normal(width, 3, 3) / 3,
            depthwise_bias=normal(width),
        )
    return tokens, weights


def check(tokens: Tensor, grid: tuple[int, int], prefix: int, weights: LPHWeights) -> None:
    exact = LPHWeights(*(None if w is None else w.double() for w in weights))
    expected = lph_pool_reference(tokens.double(), grid, prefix, exact)
    pooled = lph_pool(tokens, grid, prefix, weights, backend="triton")
    assert pooled.shape == expected.shape and pooled.dtype == torch.float32
    for row in range(2):
        error = (pooled[:, row] - expected[:, row]).norm() / expected[:, row].norm()
        assert error <= ERROR[tokens.dtype]


@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
@pytest.mark.parametrize(
    ("batch", "grid", "prefix", "width"),
    [
        (3, (1, 1), 0, 64),
        (1, (7, 7), 5, 192),
        (3, (13, 15), 2, 96),
        (3, (14, 14), 1, 64),
        (2, (3, 40), 0, 64),
        (1, (24, 24), 1, 64),
    ],
    ids=["1 token", "7x7", "13x15", "14x14", "3x40", "24x24"],
)
def test_matches_reference(
    batch: int, grid: tuple[int, int], prefix: int, width: int, full: bool
) -> None:
    tokens, weights = make(batch, grid, prefix, width, full, torch.float32)
    check(tokens, grid, prefix, weights)


@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype, full: bool) -> None:
    tokens, weights = make(2, (5, 7), 1, 192, full, dtype)
    check(tokens, (5, 7), 1, weights)


@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
def test_strided_tokens(full: bool) -> None:
    tokens, weights = make(6, (4, 4), 1, 128, full, torch.float32)
    weights = LPHWeights(*(None if w is None else w[:64] for w in weights))
    weights = weights._replace(weight=weights.weight[:, :64])
    check(tokens[::2, :, ::2], (4, 4), 1, weights)  # every other image and channel
    turned = tokens[..., :64].transpose(0, 1).contiguous().transpose(0, 1)  # tokens outermost
    check(turned, (4, 4), 1, weights)
    check(tokens[:3, 1:, :64], (4, 4), 0, weights)


@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
def test_channels_that_lie_far_apart(full: bool) -> None:
    _, weights = make(1, (2, 3), 1, 5, full, torch.bfloat16)
    check(far_apart(2, 7, 5), (2, 3), 1, weights)


@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
def test_no_images(full: bool) -> None:
    tokens, weights = make(0, (4, 4), 1, 64, full, torch.float32)
    assert lph_pool(tokens, (4, 4), 1, weights, backend="triton").shape == (0, 2, 64)


def test_a_nan_stays_in_its_image() -> None:
    tokens, weights = make(3, (7, 7), 1, 64, False, torch.float32)
    tokens[1, 5, 3] = float("nan")
    pooled = lph_pool(tokens, (7, 7), 1, weights, backend="triton")
    assert pooled[[0, 2]].isfinite().all() and pooled[1, 0].isnan().all()


def test_prefix_tokens_are_not_read() -> None:
    tokens, weights = make(2, (3, 3), 4, 64, True, torch.float32)
    tokens[:, :4] = float("nan")
    assert lph_pool(tokens, (3, 3), 4, weights, backend="triton").isfinite().all()


def test_compiled_call_is_one_node() -> None:
    tokens, weights = make(2, (3, 5), 1, 64, True, torch.float32)

    def run(x: Tensor) -> Tensor:
        return lph_pool(x * 1.0, (3, 5), 1, weights, backend="triton") + 1

    compiled: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), run(tokens))


def test_compiled_call_runs_what_was_measured_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, weights = make(2, (3, 5), 1, 64, True, torch.float32)
    ran: list[str] = []
    willing = [replace(b, missing=lambda device: None, run=ran_as(b, ran)) for b in op.backends]
    monkeypatch.setattr(op, "backends", tuple(willing))
    compiled: Any = torch.compile(
        lambda x: lph_pool(x, (3, 5), 1, weights), fullgraph=True, backend="aot_eager"
    )
    for name in ("triton", "cpp"):
        monkeypatch.setattr(
            op._contest, "known", lambda runs, *a, name=name: [n for n, _ in runs].index(name)
        )
        torch.testing.assert_close(compiled(tokens), lph_pool_reference(tokens, (3, 5), 1, weights))
        assert ran.pop() == name and not ran


def ran_as(backend: Any, ran: list[str]) -> Any:
    """The reference under the name of another backend."""

    def run(*args: Any) -> Tensor:
        ran.append(backend.name)
        return lph_pool_reference(*args)

    return run


def test_operator_registration() -> None:
    tokens, weights = make(1, (3, 2), 1, 32, True, torch.float32)
    for x in (tokens, tokens.transpose(0, 1).clone().transpose(0, 1)):
        arguments = (x, 3, 2, 1, *weights)
        torch.library.opcheck(torch.ops.lgvit_fast.lph_pool_triton.default, arguments)
        torch.library.opcheck(torch.ops.lgvit_fast.lph_pool.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(63)}, "bias has shape"),
        ({"weight": torch.zeros(64, 64, dtype=torch.float16)}, "weight is torch.float16"),
        ({"shift": None}, "needs scale, shift"),
        ({"depthwise_weight": torch.zeros(64, 9)}, "depthwise_weight has shape"),
        ({"patch_grid": (4, 5)}, "rows an image"),
        ({"tokens": torch.zeros(2, 17, 64, dtype=torch.float64)}, "expected one of"),
        ({"tokens": torch.zeros(17, 64)}, r"expected \[B, P \+ N, C\]"),
    ],
    ids=["bias", "dtype", "missing", "taps", "grid", "float64", "2-d"],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    from lgvit_fast.kernels.lph import lph_pool as launch

    tokens, weights = make(2, (4, 4), 1, 64, True, torch.float32)
    arguments = {"tokens": tokens, "patch_grid": (4, 4), "num_prefix_tokens": 1}
    with pytest.raises(ValueError, match=message):
        launch(**(arguments | weights._asdict() | moved(change)))


def test_refusals() -> None:
    tokens, weights = make(1, (2, 2), 0, 64, False, torch.float32)
    exact = LPHWeights(weights.weight.double(), weights.bias.double())
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        lph_pool(tokens.double(), (2, 2), 0, exact, backend="triton")
    with ops.backend("triton"), pytest.raises(RuntimeError, match="no gradient"):
        lph_pool(tokens.requires_grad_(), (2, 2), 0, weights)
