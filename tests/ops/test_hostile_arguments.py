"""No call leaves its buffers: arguments that do not fit end in an error raised before any pointer."""

import pytest
import torch

from lgvit_fast import _extension
from lgvit_fast.ops import compact_
from tests.ops.hostile import (
    B,
    cases,
    compact_arguments,
    end_exit_arguments,
    gah_arguments,
    lph_arguments,
    step_arguments,
    tail_arguments,
)

NATIVE = _extension.why_missing(torch.device("cpu")) is None
CASES = cases(NATIVE)
needs_extension = pytest.mark.skipif(not NATIVE, reason="no compiled CPU kernels")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_call_is_refused(name):
    with torch.no_grad(), pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
        CASES[name]()
    assert str(raised.value)
    if name.startswith("torch") or (name.startswith("operator") and "sparse" not in str(raised)):
        assert (
            isinstance(raised.value, (ValueError, TypeError, NotImplementedError)) or "meta" in name
        )


@needs_extension
def test_the_arguments_that_fit_are_taken():
    ops = torch.ops.lgvit_fast
    assert ops.lph_pool_cpp(**lph_arguments()).isfinite().all()
    assert ops.lph_tail(**tail_arguments()).isfinite().all()
    assert ops.gah_pool_cpp(**gah_arguments()).isfinite().all()
    assert ops.gah_pool_cpp(**gah_arguments(stride=2**63 - 1)).isfinite().all()
    assert ops.gah_pool_cpp(**gah_arguments(stride=2**62, average=True)).isfinite().all()
    assert ops.exit_step_cpp(**step_arguments())[0].isfinite().all()
    given = compact_arguments()
    ops.compact_(**given)
    assert given["count"].item() == 2
    given = end_exit_arguments()
    ops.end_exit_(**given)
    assert given["counts"][0].item() == 2


@needs_extension
def test_no_image_at_all_is_fine():
    ops = torch.ops.lgvit_fast
    tokens, state = torch.randn(0, 13, 16), torch.zeros(0, 2, dtype=torch.int32)
    assert ops.lph_pool_cpp(**lph_arguments(tokens=tokens)).shape == (0, 2, 16)
    assert ops.lph_tail(**tail_arguments(tokens=tokens, hidden=tokens)).shape == (0, 2, 16)
    assert ops.gah_pool_cpp(**gah_arguments(tokens=tokens)).shape == (0, 4, 16)
    logits, leave, valid = ops.exit_step_cpp(
        **step_arguments(pooled=torch.randn(0, 2, 16), tokens=tokens, state=state)
    )
    assert logits.shape == (0, 5) and leave.shape == valid.shape == (0,)


@needs_extension
def test_a_refused_compaction_moves_nothing():
    tensors = [torch.arange(12.0).view(B, 4), torch.arange(B)[:2]]
    with pytest.raises(ValueError, match="companion 1"):
        torch.ops.lgvit_fast.compact_(**compact_arguments(tensors=tensors))
    assert torch.equal(tensors[0], torch.arange(12.0).view(B, 4))


@needs_extension
def test_a_refused_exit_writes_nothing():
    given = end_exit_arguments(rows=torch.tensor([0, 1, B]))
    tensors = [
        v for value in given.values() for v in (value if isinstance(value, list) else [value])
    ]
    before = [t.clone() for t in tensors if isinstance(t, torch.Tensor)]
    with pytest.raises(ValueError, match=f"rows holds {B}"):
        torch.ops.lgvit_fast.end_exit_(**given)
    after = [t for t in tensors if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@needs_extension
def test_flags_that_are_any_byte():
    keep = torch.tensor([0, 2, 255], dtype=torch.uint8).view(torch.bool)
    given = compact_arguments(keep=keep)
    torch.ops.lgvit_fast.compact_(**given)
    assert given["count"].item() == 2 and given["tensors"][1][:2].sort().values.tolist() == [1, 2]


@needs_extension
def test_compaction_bumps_versions_so_a_gradient_is_never_silently_wrong():
    weight = torch.ones(3, requires_grad=True)
    tokens = torch.tensor([1.0, 2.0, 3.0])
    loss = (weight * tokens).sum()  # keeps the tokens for the gradient
    before = tokens._version
    compact_(tokens, torch.tensor([False, True, True]), backend="cpp")
    assert tokens._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
def test_the_policy_state_and_the_count_bump_versions():
    given = step_arguments()
    before = given["state"]._version
    torch.ops.lgvit_fast.exit_step_cpp(**given)
    assert given["state"]._version > before
    given = compact_arguments()
    torch.ops.lgvit_fast.compact_(**given)
    assert given["count"]._version > 0 and all(t._version > 0 for t in given["tensors"])
    with torch.inference_mode():  # no counters here, and none missed
        given = compact_arguments()
        torch.ops.lgvit_fast.compact_(**given)
        assert given["count"].item() == 2


@needs_extension
@pytest.mark.parametrize(
    "op", ["compact_", "end_exit_", "lph_tail", "lph_pool_cpp", "gah_pool_cpp", "exit_step_cpp"]
)
def test_an_operator_without_a_gradient_says_so(op):
    call = getattr(torch.ops.lgvit_fast, op)
    leaf = torch.randn(B, 13, 16, requires_grad=True)
    arguments = {
        "compact_": lambda t: compact_arguments(tensors=[t]),
        "end_exit_": lambda t: end_exit_arguments(tokens=t, into=None),
        "lph_tail": lambda t: tail_arguments(tokens=t),
        "lph_pool_cpp": lambda t: lph_arguments(tokens=t),
        "gah_pool_cpp": lambda t: gah_arguments(tokens=t),
        "exit_step_cpp": lambda t: step_arguments(tokens=t),
    }[op](leaf * 1)
    with pytest.raises(RuntimeError, match="has no gradient"):
        call(**arguments)
    with torch.no_grad():
        call(**arguments)
