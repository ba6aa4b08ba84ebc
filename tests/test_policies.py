"""Every policy on logits whose statistics are known, its edge cases and its bad arguments."""

import math

import pytest
import torch

from lgvit_fast import Confidence, Entropy, Patience, PatientConfident, Replay
from lgvit_fast.ops.exit_step import ExitStep, apply_rule


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def run(policy, *exits):
    """Exit index of each image given the logits of each exit, or -1 if it never leaves."""
    batch = len(exits[0])
    state = policy.start(batch, torch.device("cpu"))
    left = torch.full((batch,), -1)
    for index, logits in enumerate(exits):
        step = ExitStep(logits, *apply_rule(policy.rule(index), logits, state))
        leave = policy.decide(step, state, index).leave
        left = torch.where((left < 0) & leave, index, left)
    return left.tolist()


SURE, UNSURE = [0.9, 0.05, 0.05], [0.4, 0.3, 0.3]
OTHER = [0.05, 0.9, 0.05]
ENTROPY_SURE = -(0.9 * math.log(0.9) + 0.1 * math.log(0.05))


def test_confidence():
    assert run(Confidence(0.5), logits_of(UNSURE, SURE), logits_of(SURE, SURE)) == [1, 0]


def test_confidence_is_strict():
    even = torch.zeros(1, 2)
    assert run(Confidence(0.5), even) == [-1]
    assert run(Confidence(0.499), even) == [0]


def test_entropy_is_in_nats_and_strict():
    assert run(Entropy(ENTROPY_SURE + 1e-9), logits_of(SURE)) == [0]
    assert run(Entropy(ENTROPY_SURE - 1e-9), logits_of(SURE)) == [-1]
    certain = torch.tensor([[0.0, -1e4]])
    assert run(Entropy(0.0), certain) == [-1]


def test_underflowing_probability_has_entropy_zero():
    """The published code gives NaN here, so its surest images never leave."""
    assert run(Entropy(1e-6), torch.tensor([[0.0, -1000.0, -2000.0]])) == [0]
    assert run(Entropy(1e-6), torch.tensor([[0.0, -math.inf]])) == [0]


def test_thresholds_per_exit():
    logits = logits_of(SURE)
    assert run(Confidence([0.99, 0.95, 0.5]), logits, logits, logits) == [2]
    assert run(Entropy([0.1, 2.0]), logits, logits) == [1]


def test_patience_counts_the_first_head():
    assert run(Patience(1), logits_of(SURE)) == [0]
    assert run(Patience(2), logits_of(SURE), logits_of(SURE)) == [1]


def test_patience_starts_anew_on_another_class():
    exits = [logits_of(row) for row in (SURE, SURE, OTHER, OTHER, OTHER)]
    assert run(Patience(3), *exits) == [4]


def test_patient_confident_ignores_the_class():
    assert run(PatientConfident(0.5, 2), logits_of(SURE), logits_of(OTHER)) == [1]
    exits = [logits_of(row) for row in (SURE, UNSURE, SURE, SURE)]
    assert run(PatientConfident(0.5, 2), *exits) == [3]


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "policy", [Confidence(0.0), Entropy(100.0), Patience(1), PatientConfident(100.0, 1)], ids=repr
)
def test_nan_never_leaves_and_starts_the_run_anew(policy, bad):
    broken = torch.tensor([[1.0, bad, 0.0], [3.0, 0.0, 0.0]])
    assert run(policy, broken) == [-1, 0]
    _, valid = apply_rule(policy.rule(0), broken, policy.start(2, torch.device("cpu")))
    assert valid.tolist() == [False, True]


def test_nan_breaks_a_run_of_patience():
    broken = torch.full((1, 3), math.nan)
    exits = [logits_of(SURE), broken, logits_of(SURE), logits_of(SURE)]
    assert run(Patience(2), *exits) == [3]


def test_replay_scripts_by_place():
    anything = torch.randn(4, 3)
    assert run(Replay([2, 0, 5, 1]), anything, anything, anything) == [2, 0, -1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_taken_in_float32_or_better(dtype):
    logits = torch.randn(64, 100).to(dtype)
    state = Confidence().start(64, torch.device("cpu"))
    leave, _ = apply_rule(Confidence(0.05).rule(0), logits, state)
    assert torch.equal(leave, logits.double().softmax(-1).amax(-1) > 0.05)


def test_published_defaults():
    assert Confidence().threshold == 0.865
    assert Entropy().threshold == 0.6
    assert Patience().patience == 7
    assert (PatientConfident().threshold, PatientConfident().patience) == (0.5, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Confidence(1.5), "between 0 and 1", id="confidence-above-1"),
        pytest.param(lambda: Confidence(-0.1), "between 0 and 1", id="confidence-negative"),
        pytest.param(lambda: Confidence(math.nan), "between 0 and 1", id="confidence-nan"),
        pytest.param(lambda: Confidence([0.5, 2.0]), "between 0 and 1", id="one-of-several"),
        pytest.param(lambda: Confidence([]), "empty", id="no-thresholds"),
        pytest.param(lambda: Confidence("0.5"), "expected a number", id="text"),
        pytest.param(lambda: Entropy(-1.0), "0 or more", id="entropy-negative"),
        pytest.param(lambda: Entropy(math.inf), "0 or more", id="entropy-inf"),
        pytest.param(lambda: Patience(0), "at least 1", id="patience-0"),
        pytest.param(lambda: Patience(1.5), "at least 1", id="patience-float"),
        pytest.param(lambda: PatientConfident(0.5, 0), "at least 1", id="patient-confident-0"),
        pytest.param(lambda: Replay([[1]]), "expected", id="replay-2d"),
        pytest.param(lambda: Replay([-1]), "from 0 on", id="replay-negative"),
        pytest.param(lambda: Replay([0.5]), "integers", id="replay-float"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
