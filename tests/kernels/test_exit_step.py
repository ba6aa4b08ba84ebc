"""The exit step's kernel against the reference, state and odd numbers included."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lgvit_fast.kernels import exit_step as kernel
from lgvit_fast.ops.exit_step import ExitRule, RuleKind, exit_step, exit_step_reference
from tests.kernels.device import far_apart, generator, moved

ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RULES = {
    "never": ExitRule(RuleKind.NEVER),
    "confidence": ExitRule(RuleKind.CONFIDENCE, 0.5),
    "entropy": ExitRule(RuleKind.ENTROPY, 1.2),
    "patience": ExitRule(RuleKind.PATIENCE, patience=2),
    "patient-confident": ExitRule(RuleKind.PATIENT_CONFIDENT, 1.2, 2),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def make(
    batch: int, vectors: int, class_tokens: int, width: int, classes: int, dtype: torch.dtype
) -> dict[str, Any]:
    g = generator(batch + classes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    columns = (vectors + class_tokens) * width
    return {
        "pooled": normal(batch, vectors, width),
        "tokens": normal(batch, 7, width).to(dtype),
        "num_class_tokens": class_tokens,
        "weight": (2 * normal(classes, columns) / columns**0.5).to(dtype),
        "bias": normal(classes),
    }


def fresh(batch: int) -> Tensor:
    return torch.tensor([0, -1], dtype=torch.int32).repeat(batch, 1)


@rules
@pytest.mark.parametrize(
    ("batch", "vectors", "class_tokens", "width", "classes"),
    [(1, 2, 1, 96, 10), (3, 1, 2, 64, 70), (17, 1, 0, 32, 333), (3, 1, 1, 192, 1)],
    ids=["vit", "deit", "two row blocks", "one class"],
)
def test_matches_reference(
    batch: int, vectors: int, class_tokens: int, width: int, classes: int, rule: ExitRule
) -> None:
    arguments = make(batch, vectors, class_tokens, width, classes, torch.float32)
    state, expected_state = fresh(batch), fresh(batch)
    for _ in range(3):  # a later exit meets the state of the ones before
        step = exit_step(**arguments, rule=rule, state=state, backend="triton")
        expected = exit_step_reference(**arguments, rule=rule, state=expected_state)
        torch.testing.assert_close(step.logits, expected.logits, rtol=2e-5, atol=2e-5)
        assert step.leave.equal(expected.leave) and step.valid.equal(expected.valid)
        assert state.equal(expected_state)
        arguments["pooled"] = arguments["pooled"].roll(1, dims=-1) * 1.5


def test_large_batches_take_all_vectors_in_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(18, 3, 2, 48, 40, torch.float32)
    split = kernel.exit_step(**arguments, rule=(3, 0.0, 1), state=fresh(18))
    monkeypatch.setattr(kernel, "FEW_PROGRAMS", 0)
    whole = kernel.exit_step(**arguments, rule=(3, 0.0, 1), state=fresh(18))
    expected = exit_step_reference(**arguments, rule=RULES["never"], state=fresh(18)).logits
    for step in (split, whole):
        torch.testing.assert_close(step.logits, expected, rtol=2e-5, atol=2e-5)
        assert step.prediction.equal(expected.argmax(1).int()) and step.leave.all()


@pytest.mark.parametrize("dtype", ERROR, ids=["fp32", "bf16", "fp16"])
def test_statistics(dtype: torch.dtype) -> None:
    arguments = make(5, 2, 1, 64, 100, dtype)
    step = kernel.exit_step(**arguments, rule=(0, 0.0, 0), state=fresh(5))
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    expected = exit_step_reference(**exact, rule=RULES["never"], state=fresh(5)).logits
    assert step.logits.dtype == dtype
    assert (step.logits - expected).norm() <= ERROR[dtype] * expected.norm()
    # The statistics are those of the logits as they are given out.
    probabilities = torch.softmax(step.logits.double(), dim=-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    torch.testing.assert_close(step.confidence.double(), probabilities.amax(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(step.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    assert step.prediction.tolist() == step.logits.argmax(-1).tolist()


def test_many_classes() -> None:
    arguments = make(2, 1, 0, 16, 21843, torch.float32)
    step = kernel.exit_step(**arguments, rule=(2, 9.0, 0), state=fresh(2))
    expected = torch.special.entr(torch.softmax(step.logits.double(), -1)).sum(-1)
    torch.testing.assert_close(step.entropy.double(), expected, rtol=1e-5, atol=0)
    assert step.leave.equal(expected < 9.0)


@rules
def test_numbers_that_are_none(rule: ExitRule) -> None:
    arguments = make(6, 1, 0, 64, 300, torch.float32)
    arguments["pooled"][1, 0, 3] = float("nan")
    arguments["bias"][7] = float("inf")
    arguments["pooled"] = torch.cat((arguments["pooled"], torch.full((1, 1, 64), 1e38)))
    arguments["tokens"] = torch.zeros(7, 1, 64)
    state, expected_state = fresh(7), fresh(7)
    step = exit_step(**arguments, rule=rule, state=state, backend="triton")
    expected = exit_step_reference(**arguments, rule=rule, state=expected_state)
    assert not step.valid.any() and not step.leave.any()
    assert expected.valid.equal(step.valid) and state.equal(expected_state)


@rules
def test_a_nan_image_among_others(rule: ExitRule) -> None:
    arguments = make(5, 1, 1, 32, 100, torch.float32)
    arguments["tokens"][2, 0, 9] = float("nan")
    state = fresh(5)
    for _ in range(2):
        step = exit_step(**arguments, rule=rule, state=state, backend="triton")
    assert step.valid.tolist() == [True, True, False, True, True]
    assert not step.leave[2] and state[2].tolist() in ([0, -1], [0, 0])


@pytest.mark.parametrize("offset", [-2000.0, 2000.0])
def test_far_logits_and_impossible_classes(offset: float) -> None:
    arguments = make(3, 1, 1, 64, 300, torch.float32)
    arguments["bias"] += offset
    arguments["bias"][:128] = -float("inf")  # whole tiles of classes without mass
    step = kernel.exit_step(**arguments, rule=(1, 0.0, 0), state=fresh(3))
    probabilities = torch.softmax(step.logits.double(), dim=-1)
    torch.testing.assert_close(step.confidence.double(), probabilities.amax(-1), rtol=1e-5, atol=0)
    entropy = torch.special.entr(probabilities).sum(-1)
    torch.testing.assert_close(step.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    assert step.leave.all() and step.valid.all()


def test_ties_go_to_the_first_class() -> None:
    arguments = make(2, 1, 0, 64, 300, torch.float32)
    arguments["weight"].zero_()
    arguments["bias"].zero_()
    arguments["bias"][[70, 200]] = 1.0
    step = kernel.exit_step(**arguments, rule=(0, 0.0, 0), state=fresh(2))
    assert step.prediction.tolist() == [70, 70]


def test_comparisons_are_strict() -> None:
    arguments = make(2, 1, 0, 64, 2, torch.float32)
    arguments["weight"].zero_()
    arguments["bias"].zero_()  # confidence exactly 1/2
    for threshold, leaves in ((0.5, False), (0.4999, True)):
        rule = ExitRule(RuleKind.CONFIDENCE, threshold)
        step = exit_step(**arguments, rule=rule, state=fresh(2), backend="triton")
        assert step.leave.tolist() == [leaves, leaves]


def test_strided_state_and_tokens() -> None:
    arguments = make(4, 1, 2, 64, 10, torch.float32)
    wide = torch.full((4, 5), 7, dtype=torch.int32)
    wide[:, 1:3] = fresh(4)
    arguments["tokens"] = arguments["tokens"].transpose(0, 1).contiguous().transpose(0, 1)
    state = fresh(4)
    step = exit_step(**arguments, rule=RULES["patience"], state=wide[:, 1:3], backend="triton")
    expected = exit_step_reference(**arguments, rule=RULES["patience"], state=state)
    torch.testing.assert_close(step.logits, expected.logits, rtol=2e-5, atol=2e-5)
    assert wide[:, 1:3].equal(state) and (wide[:, [0, 3, 4]] == 7).all()


def test_channels_that_lie_far_apart() -> None:
    arguments = make(2, 1, 1, 5, 10, torch.bfloat16) | {"tokens": far_apart(2, 7, 5)}
    step = kernel.exit_step(**arguments, rule=(0, 0.0, 0), state=fresh(2))
    near = arguments | {"tokens": arguments["tokens"].contiguous()}
    assert kernel.exit_step(**near, rule=(0, 0.0, 0), state=fresh(2)).logits.equal(step.logits)


def test_no_images() -> None:
    arguments = make(0, 2, 1, 64, 10, torch.float32)
    step = exit_step(**arguments, rule=RULES["entropy"], state=fresh(0), backend="triton")
    assert step.logits.shape == (0, 10) and step.leave.shape == (0,)


def test_compiled_call_is_one_node() -> None:
    arguments = make(3, 1, 1, 64, 10, torch.float32)

    def run(state: Tensor) -> tuple[Tensor, ...]:
        return tuple(exit_step(**arguments, rule=RULES["patience"], state=state, backend="triton"))

    state, other = fresh(3), fresh(3)
    compiled: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(state), run(other), strict=True):
        assert got.equal(expected)
    assert state.equal(other)


def test_operator_registration() -> None:
    a = make(3, 1, 1, 64, 10, torch.float32)
    arguments = (a["pooled"], a["tokens"], 1, a["weight"], a["bias"], 3, 0.0, 2, fresh(3))
    torch.library.opcheck(torch.ops.lgvit_fast.exit_step_triton.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(10, 64)}, "weight has shape"),
        ({"bias": torch.zeros(9)}, "bias has shape"),
        ({"state": torch.zeros(3, 2)}, "state is torch.float32"),
        ({"rule": (9, 0.0, 0)}, "rule has kind 9"),
        ({"num_class_tokens": 8}, "num_class_tokens is 8"),
        ({"tokens": torch.zeros(2, 7, 64)}, "tokens has shape"),
    ],
    ids=["weight", "bias", "state", "rule", "class tokens", "batch"],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = make(3, 1, 1, 64, 10, torch.float32)
    with pytest.raises(ValueError, match=message):
        kernel.exit_step(**(arguments | {"rule": (0, 0.0, 0), "state": fresh(3)} | moved(change)))
