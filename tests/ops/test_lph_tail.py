"""A local head as a GEMM and one kernel, and the contest between two ways to run it."""

import logging

import pytest
import torch

from lgvit_fast import _extension
from lgvit_fast.ops import contest, dispatch
from lgvit_fast.ops.contest import Contest, size_class
from lgvit_fast.ops.dispatch import Backend, Op
from lgvit_fast.ops.lph import gemm_and_tail, lph_pool_reference
from tests.ops.hostile import tail_arguments
from tests.ops.test_heads_cpp import double, lph_weights, relative_error, tokens_of

needs_extension = pytest.mark.skipif(
    _extension.why_compact_missing() is not None, reason="no compiled operators"
)
ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@needs_extension
@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
def test_equals_the_reference(dtype, full):
    for batch, grid, prefix, width in ((0, (3, 2), 1, 8), (2, (5, 7), 2, 24), (1, (1, 1), 0, 7)):
        tokens = tokens_of(batch, grid, prefix, 2 * width, dtype)
        weights = lph_weights(width, dtype, full)
        for x in (tokens[..., :width].contiguous(), tokens[..., :width], tokens[..., ::2]):
            expected = lph_pool_reference(x.double(), grid, prefix, double(weights))
            pooled = gemm_and_tail(x, grid, prefix, weights)
            assert pooled.dtype == torch.float32 and pooled.shape == expected.shape
            assert relative_error(pooled, expected) <= ERROR[dtype]


@needs_extension
def test_registration():
    torch.library.opcheck(torch.ops.lgvit_fast.lph_tail.default, (), tail_arguments())


@torch.library.custom_op("lgvit_test::add", mutates_args=())
def _add(x: torch.Tensor) -> torch.Tensor:
    (op,) = dispatch._registry.values()
    return op.measured(x).run(x)


@_add.register_fake
def _(x):
    return torch.empty_like(x)


class Turns:
    """An op with two backends that are measured, by a clock that says what it is told."""

    def __init__(self, monkeypatch, *times):
        self.times, self.measured, self.capturing = times, 0, False
        monkeypatch.setattr(dispatch, "_registry", {})
        monkeypatch.setattr(contest, "gpu_times", self._measure)
        monkeypatch.setattr(contest, "must_not_measure", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        self.op = Op(
            "add",
            Backend("triton", lambda x: x + 100),
            Backend("cpp", lambda x: x + 10, refuse=lambda x: "no" if x.dim() > 1 else None),
            Backend("torch", lambda x: x + 1),
            contest=Contest("add", lambda x: None if x.dtype.is_complex else size_class(len(x))),
            compiled=Backend("measured", _add),
        )

    def _measure(self, calls):
        self.measured += 1
        assert [int(call()[0]) for call in calls] == [100, 10]
        return self.times

    def __call__(self, rows=1, **kwargs):
        return int(self.op(torch.zeros(rows), **kwargs)[0])


@pytest.mark.parametrize(("times", "expected"), [((1.0, 2.0), 100), ((2.0, 1.0), 10)])
def test_the_fastest_is_taken_and_measured_once_a_size(monkeypatch, times, expected, caplog):
    turns = Turns(monkeypatch, *times)
    with caplog.at_level(logging.INFO, logger="lgvit_fast"):
        assert [turns(16), turns(9), turns(12)] == [expected] * 3
    assert turns.measured == 1 and "triton" in caplog.text and "cpp" in caplog.text
    turns.times = times[::-1]  # what is true of 16 rows need not be true of 256
    assert turns(256) == 110 - expected and turns.measured == 2
    assert turns(16) == expected and turns.measured == 2


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    turns = Turns(monkeypatch, 2.0, 1.0)
    turns.capturing = True
    assert turns(4) == 100 and turns.measured == 0
    turns.capturing = False
    assert turns(4) == 10 and turns.measured == 1
    turns.capturing = True
    assert turns(4) == 10 and turns.measured == 1  # what was measured before holds


def test_a_compiled_graph_takes_what_was_measured_before(monkeypatch):
    turns = Turns(monkeypatch, 2.0, 1.0)
    compiled = torch.compile(lambda x: turns.op(x) * 2, fullgraph=True, backend="aot_eager")
    x = torch.zeros(4)
    assert int(compiled(x)[0]) == 200 and turns.measured == 0  # the first, where nothing is known
    assert turns(4) == 10 and turns.measured == 1
    assert int(compiled(x)[0]) == 20 and turns.measured == 1  # without compiling again
    assert int(compiled(torch.zeros(64))[0]) == 200 and turns.measured == 1
    only = torch.compile(lambda x: turns.op(x), fullgraph=True, backend="aot_eager")
    assert int(only(torch.zeros(2, 2))[0, 0]) == 100  # cpp refuses: nothing to choose


def test_a_forced_choice_and_a_single_candidate_are_not_measured(monkeypatch):
    turns = Turns(monkeypatch, 2.0, 1.0)
    assert [turns(backend=name) for name in ("triton", "cpp", "torch")] == [100, 10, 1]
    assert int(turns.op(torch.zeros(2, 2))[0, 0]) == 100  # cpp refuses
    assert complex(turns.op(torch.zeros(2, dtype=torch.complex64))[0]) == 100  # no kind: the first
    assert turns.measured == 0


def test_the_lph_op_tells_apart_what_differs_in_speed():
    """Rows that differ by a factor of 16 never share a choice."""
    classes = [size_class(batch * 196) for batch in (1, 16, 256)]
    assert len(set(classes)) == 3 and size_class(0) == size_class(1) == 0
