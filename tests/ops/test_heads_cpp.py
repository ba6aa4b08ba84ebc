"""The compiled CPU kernels of the heads against the torch reference in float64."""

import threading

import pytest
import torch
from torch import Tensor

from lgvit_fast import _extension
from lgvit_fast.ops.exit_step import ExitRule, RuleKind, exit_step
from lgvit_fast.ops.gah import gah_pool, gah_pool_reference
from lgvit_fast.ops.lph import LPHWeights, lph_pool, lph_pool_reference

pytestmark = pytest.mark.skipif(
    _extension.why_missing(torch.device("cpu")) is not None, reason="no compiled CPU kernels"
)

GRIDS = [(1, 1), (7, 7), (13, 15), (14, 14), (24, 24), (1, 9), (9, 1)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


def lph_weights(width: int, dtype: torch.dtype, full: bool, seed: int = 0) -> LPHWeights:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=draw) * std + mean

    weight, bias = normal(width, width, std=width**-0.5).to(dtype), normal(width)
    if not full:
        return LPHWeights(weight, bias)
    scale, shift = normal(width, std=0.3, mean=1), normal(width)
    return LPHWeights(weight, bias, scale, shift, normal(width, 3, 3, std=0.3), normal(width))


def double(weights: LPHWeights) -> LPHWeights:
    return LPHWeights(*(None if tensor is None else tensor.double() for tensor in weights))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def tokens_of(batch: int, grid: tuple[int, int], prefix: int, width: int, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(1)
    rows = prefix + grid[0] * grid[1]
    return torch.randn(batch, rows, width, generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
@pytest.mark.parametrize("width", [64, 96, 100])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_lph_pool_equals_the_reference(grid, width, full, dtype):
    for batch, prefix in ((0, 1), (1, 0), (3, 2)):
        tokens = tokens_of(batch, grid, prefix, width, dtype)
        weights = lph_weights(width, dtype, full)
        pooled = lph_pool(tokens, grid, prefix, weights, backend="cpp")
        expected = lph_pool_reference(tokens.double(), grid, prefix, double(weights))
        assert pooled.dtype == torch.float32 and pooled.shape == expected.shape
        assert relative_error(pooled, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["subsample", "average"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_gah_pool_equals_the_reference(grid, stride, pool, dtype):
    for batch, prefix, width, heads in ((0, 1, 64, 8), (1, 0, 100, 4), (3, 2, 96, 8)):
        tokens = tokens_of(batch, grid, prefix, width, dtype)
        qk = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(2))
        qk = (2 * width**-0.5 * qk).to(dtype)
        arguments = (grid, prefix, qk, heads, stride, pool)
        pooled = gah_pool(tokens, *arguments, backend="cpp")
        arguments = (grid, prefix, qk.double(), heads, stride, pool)
        expected = gah_pool_reference(tokens.double(), *arguments)
        assert pooled.dtype == dtype and pooled.shape == expected.shape == (batch, heads, width)
        assert relative_error(pooled, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_published_size(dtype):
    tokens = tokens_of(3, (14, 14), 1, 768, dtype)
    for full in (True, False):
        weights = lph_weights(768, dtype, full)
        expected = lph_pool_reference(tokens.double(), (14, 14), 1, double(weights))
        pooled = lph_pool(tokens, (14, 14), 1, weights, backend="cpp")
        assert relative_error(pooled, expected) <= TOLERANCE[dtype]


def views(tokens: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts, with NaN wherever memory is not part of the view."""
    batch, rows, width = tokens.shape
    poison = torch.full((batch + 1, rows + 3, width + 5), torch.nan, dtype=tokens.dtype)
    sliced = poison[1:, 2:-1, 3:-2]
    sliced.copy_(tokens)
    every_second = torch.full((2 * batch, rows, width), torch.nan, dtype=tokens.dtype)[::2]
    every_second.copy_(tokens)
    transposed = tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return {"sliced": sliced, "every second": every_second, "transposed": transposed}


@pytest.mark.parametrize("layout", ["sliced", "every second", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_any_strides(layout, dtype):
    grid, prefix, width = (5, 6), 2, 100
    tokens = tokens_of(3, grid, prefix, width, dtype)
    view = views(tokens)[layout]
    weights = lph_weights(width, dtype, full=True)
    qk = torch.randn(2 * width, width).to(dtype)
    rule, state = ExitRule(RuleKind.NEVER), torch.zeros(3, 2, dtype=torch.int32)
    matrix, bias = torch.randn(7, 6 * width).to(dtype), torch.randn(7)
    for x in (tokens, view):
        local = lph_pool(x, grid, prefix, weights, backend="cpp")
        spread = gah_pool(x, grid, prefix, qk, 4, 2, "average", backend="cpp")
        step = exit_step(spread, x, 2, matrix, bias, rule, state, backend="cpp")
        if x is tokens:
            expected = (local, spread, step.logits)
    torch.testing.assert_close((local, spread, step.logits), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend_of_linear", ["linear", "conv", "packed"])
def test_an_image_does_not_depend_on_its_batch(backend_of_linear, monkeypatch):
    monkeypatch.setenv("LGVIT_LINEAR", backend_of_linear)
    tokens = tokens_of(9, (14, 14), 1, 96, torch.float32)
    weights = lph_weights(96, torch.float32, full=True)
    qk = torch.randn(2 * 96, 96) * 0.1
    for op in (
        lambda x: lph_pool(x, (14, 14), 1, weights, backend="cpp"),
        lambda x: gah_pool(x, (14, 14), 1, qk, 8, 2, backend="cpp"),
    ):
        together = op(tokens)
        alone = torch.cat([op(tokens[i : i + 1]) for i in range(9)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_nan_stays_in_its_image():
    tokens = tokens_of(3, (6, 6), 1, 64, torch.float32)
    weights, qk = lph_weights(64, torch.float32, full=True), torch.randn(128, 64)
    clean = lph_pool(tokens, (6, 6), 1, weights, backend="cpp")
    spread = gah_pool(tokens, (6, 6), 1, qk, backend="cpp")
    tokens[1, 1] = torch.nan
    poisoned = lph_pool(tokens, (6, 6), 1, weights, backend="cpp")
    assert poisoned[1].isnan().any()
    torch.testing.assert_close(poisoned[::2], clean[::2], rtol=0, atol=0)
    poisoned = gah_pool(tokens, (6, 6), 1, qk, backend="cpp")
    assert poisoned[1].isnan().all()
    torch.testing.assert_close(poisoned[::2], spread[::2], rtol=0, atol=0)


RULES = [
    ExitRule(RuleKind.NEVER),
    ExitRule(RuleKind.CONFIDENCE, 0.4),
    ExitRule(RuleKind.ENTROPY, 1.2),
    ExitRule(RuleKind.PATIENCE, patience=2),
    ExitRule(RuleKind.PATIENT_CONFIDENT, 1.5, 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind.name.lower())
@pytest.mark.parametrize("class_tokens", [0, 1, 2])
def test_exit_step_equals_the_reference(class_tokens, rule, dtype):
    for batch, classes, width in ((0, 5, 64), (1, 1, 64), (57, 10, 100)):
        draw = torch.Generator().manual_seed(3)
        tokens = tokens_of(batch, (2, 2), 2, width, dtype)
        pooled = torch.randn(batch, 2, width, generator=draw)
        weight = torch.randn(classes, (2 + class_tokens) * width, generator=draw)
        weight, bias = (0.15 * weight).to(dtype), torch.randn(classes, generator=draw)
        states = [torch.zeros(batch, 2, dtype=torch.int32) for _ in range(2)]
        arguments = (pooled, tokens, class_tokens, weight, bias, rule)
        for _ in range(3):  # the state carries over
            steps = [
                exit_step(*arguments, state, backend=backend)
                for backend, state in zip(("cpp", "torch"), states, strict=True)
            ]
            if batch:
                tolerance = TOLERANCE[dtype] * float(steps[1].logits.abs().max())
                torch.testing.assert_close(*(s.logits for s in steps), rtol=0, atol=tolerance)
            if dtype == torch.float32:
                assert torch.equal(steps[0].leave, steps[1].leave)
                assert torch.equal(*states)
            assert torch.equal(steps[0].valid, steps[1].valid)
            arguments = (pooled.roll(1, 1), *arguments[1:])


EXTREME = [[0, 0, 0], [200, 0, 0], [0, -1e30, 1], [5, 5, 0], [0, -torch.inf, 1]]
EXTREME += [[torch.inf, 0, 0], [torch.nan, 0, 0], [0, torch.nan, 9], [-torch.inf] * 3]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind.name.lower())
@pytest.mark.parametrize("logits", EXTREME, ids=str)
def test_exit_step_on_extreme_logits(logits, rule):
    nothing, weight = torch.zeros(1, 1, 3), torch.zeros(3, 3)
    states = [torch.ones(1, 2, dtype=torch.int32) for _ in range(2)]
    steps = [
        exit_step(
            nothing, nothing, 0, weight, torch.tensor(logits).float(), rule, state, backend=backend
        )
        for backend, state in zip(("cpp", "torch"), states, strict=True)
    ]
    assert torch.equal(steps[0].leave, steps[1].leave)
    assert torch.equal(steps[0].valid, steps[1].valid)
    assert torch.equal(*states)


def test_inference_mode_autocast_and_gradients():
    tokens = tokens_of(2, (4, 4), 1, 64, torch.float32)
    weights = lph_weights(64, torch.float32, full=True)
    expected = lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        pooled = lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
        spread = gah_pool(tokens, (4, 4), 1, torch.randn(128, 64), backend="cpp")
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
    assert spread.dtype == torch.float32 and spread.isfinite().all()
    weights.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
    lph_pool(tokens, (4, 4), 1, weights).sum().backward()
    assert weights.weight.grad is not None
    with torch.no_grad():
        pooled = lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
    assert not pooled.requires_grad
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0)


def test_prepared_weights_follow_changes(monkeypatch):
    monkeypatch.setenv("LGVIT_LINEAR", "packed")
    tokens = tokens_of(2, (4, 4), 1, 64, torch.float32)
    weights, qk = (
        lph_weights(64, torch.float32, full=False),
        torch.randn(128, 64, generator=torch.Generator().manual_seed(0)),
    )
    before = gah_pool(tokens, (4, 4), 1, qk, backend="cpp")
    lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
    weights.weight.mul_(2)
    qk[:64].mul_(2)
    after = lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
    torch.testing.assert_close(after, lph_pool_reference(tokens, (4, 4), 1, weights))
    changed = gah_pool(tokens, (4, 4), 1, qk, backend="cpp")
    expected = gah_pool_reference(tokens, (4, 4), 1, qk, 8, 2, "subsample")
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, changed)
    weights.weight.data.mul_(0.5)  # escapes the version counter
    after = lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
    torch.testing.assert_close(after, lph_pool_reference(tokens, (4, 4), 1, weights))
    with torch.inference_mode():  # tensors made here have no version counter
        weights = lph_weights(64, torch.float32, full=False)
        lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
        weights.weight.add_(0.1)
        after = lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
        torch.testing.assert_close(after, lph_pool_reference(tokens, (4, 4), 1, weights))
    for seed in range(20):  # new weights, likely where freed ones were
        weights = lph_weights(64, torch.float32, full=False, seed=seed)
        pooled = lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
        torch.testing.assert_close(pooled, lph_pool_reference(tokens, (4, 4), 1, weights))


def test_threads_share_the_prepared_weights():
    tokens = tokens_of(2, (6, 6), 1, 96, torch.float32)
    weights = lph_weights(96, torch.float32, full=True)
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(5):
            results.append(lph_pool(tokens, (6, 6), 1, weights, backend="cpp"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_do():
    tokens = tokens_of(1, (4, 4), 1, 64, torch.float16)
    with pytest.raises(RuntimeError, match=r"not torch\.float16"):
        weights = lph_weights(64, torch.float16, full=True)
        lph_pool(tokens, (4, 4), 1, weights, backend="cpp")
    with pytest.raises(RuntimeError, match="meta"):
        weights = LPHWeights(torch.empty(64, 64, device="meta"), torch.empty(64, device="meta"))
        lph_pool(torch.empty(1, 17, 64, device="meta"), (4, 4), 1, weights, backend="cpp")


@pytest.mark.parametrize("bad", [{"scale": torch.ones(63)}, {"bias": torch.ones(64).int()}])
def test_wrong_vectors_are_value_errors(bad):
    tokens = tokens_of(1, (4, 4), 1, 64, torch.float32)
    weights = lph_weights(64, torch.float32, full=True)._replace(**bad)
    with pytest.raises(ValueError, match=r"scale|bias"):
        lph_pool(tokens, (4, 4), 1, weights, backend="cpp")


def test_registered_operators():
    ops = torch.ops.lgvit_fast
    tokens = tokens_of(2, (5, 4), 2, 40, torch.float32)
    weights, qk = lph_weights(40, torch.float32, full=True), torch.randn(80, 40)
    sliced = torch.randn(2, 26, 80)[:, 2:24, ::2]
    for x in (tokens, sliced):
        torch.library.opcheck(ops.lph_pool_cpp, (x, 5, 4, 2, *weights))
        torch.library.opcheck(ops.gah_pool_cpp, (x, 5, 4, 2, qk, 8, 2, False))
        step = (torch.randn(2, 2, 40), x, 1, torch.randn(6, 120), torch.randn(6))
        state = torch.zeros(2, 2, dtype=torch.int32)
        torch.library.opcheck(ops.exit_step_cpp, (*step, 1, 0.5, 0, state))


def test_compiled_graphs_hold_the_operators():
    weights = lph_weights(64, torch.float32, full=True)
    tokens = tokens_of(2, (4, 4), 1, 64, torch.float32)

    def pool(x: Tensor) -> Tensor:
        return lph_pool(x, (4, 4), 1, weights) + 1

    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), pool(tokens))


def test_one_changed_row_of_a_forced_packed_weight_is_seen(monkeypatch):
    monkeypatch.setenv("LGVIT_LINEAR", "packed")
    tokens = tokens_of(1, (2, 2), 0, 768, torch.float32)
    weights = lph_weights(768, torch.float32, full=False)
    for row in range(0, 768, 41):
        lph_pool(tokens, (2, 2), 0, weights, backend="cpp")
        weights.weight.data[row] += 1
        after = lph_pool(tokens, (2, 2), 0, weights, backend="cpp")
        torch.testing.assert_close(after, lph_pool_reference(tokens, (2, 2), 0, weights))
