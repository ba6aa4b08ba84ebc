"""Replaying policies on recorded logits, and choosing among them."""

import math

import pytest
import torch

from lgvit_fast import Confidence, Entropy, Patience, PatientConfident, Replay
from lgvit_fast.data.batches import BadImage, Batch
from lgvit_fast.evaluation import Recording, candidates, choose, measure, record, replay, sweep
from lgvit_fast.evaluation.tradeoff import KINDS, curves, describe
from tests.helpers import images, tiny_model

POLICIES = [
    Confidence(0.4),
    Confidence(0.0),
    Confidence([0.8, 0.6, 0.5, 0.2]),
    Entropy(1.2),
    Patience(1),
    Patience(2),
    Patience(4),
    PatientConfident(1.5, 2),
    Replay([0, 1, 2, 3, 4] * 8),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(exits=4)


@pytest.fixture(scope="module")
def recording(model):
    targets = torch.arange(40) % 7
    pixels = images(40)
    batches = [Batch(p, t, []) for p, t in zip(pixels.split(16), targets.split(16), strict=True)]
    return record(model, batches)


def made(*confidences, targets=None):
    """A recording with two exits and two classes; image i says class 0 with confidences[e][i]."""
    probabilities = torch.tensor(confidences, dtype=torch.float64)
    logits = torch.stack((probabilities, 1 - probabilities), dim=-1).log()
    return Recording(logits, torch.tensor(targets or [0] * len(confidences[0])), (1, 2, 4))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_replay_is_what_infer_does(model, recording, policy):
    answer = model.infer(images(40), policy)
    exit_index = replay(recording, policy)
    assert exit_index.tolist() == answer.exit_index.tolist()
    point = measure(recording, policy)
    right = (answer.prediction == recording.targets).double().mean()
    assert point.accuracy == pytest.approx(float(right))
    assert point.layer_ratio == pytest.approx(6 / float(answer.exit_layer.double().mean()))


def test_the_policies_tested_exit_everywhere(recording):
    left = torch.cat([replay(recording, policy) for policy in POLICIES[:-1]])
    assert set(left.tolist()) == {0, 1, 2, 3, 4}


def test_record_keeps_what_forward_exits_says(model, recording):
    outputs = model.forward_exits(images(40))
    expected = torch.stack((*outputs.exits, outputs.final))
    torch.testing.assert_close(recording.logits, expected)
    assert recording.layers == (*(spec.layer for spec in model.exits), 6)
    right = (outputs.final.argmax(-1) == recording.targets).double().mean()
    assert recording.final_accuracy == pytest.approx(float(right))


def test_record_passes_unreadable_files_on(model):
    bad = BadImage("torn.jpg", "OSError: truncated")
    batches = [
        Batch(images(2), torch.tensor([1, 2]), [bad]),
        Batch(torch.empty(0), torch.empty(0, dtype=torch.long), [bad]),
    ]
    recording = record(model, batches)
    assert recording.bad == [bad, bad]
    assert len(recording.targets) == 2
    with pytest.raises(ValueError, match=r"none .* torn\.jpg"):
        record(model, batches[1:])


def test_record_refuses_classes_beyond_the_models(model):
    with pytest.raises(ValueError, match="class number 7, the model has 7 classes"):
        record(model, [Batch(images(2), torch.tensor([1, 7]), [])])


def test_record_refuses_train_mode():
    with pytest.raises(RuntimeError, match="eval mode"):
        record(tiny_model(exits=2).train(), [])


def test_measure_by_hand():
    recording = made([0.9, 0.6, 0.6, 0.6], [0.9, 0.9, 0.4, 0.4], [0.1, 0.1, 0.9, 0.2])
    point = measure(recording, Confidence(0.8))
    assert replay(recording, Confidence(0.8)).tolist() == [0, 1, 2, 2]
    assert point.accuracy == 3 / 4
    assert point.layer_ratio == 4 / ((1 + 2 + 4 + 4) / 4)
    assert point.shares == (1 / 4, 1 / 4, 2 / 4)
    assert point.exit_accuracy == (1.0, 1.0, 1 / 2)


def test_an_exit_nobody_leaves_at_has_no_accuracy():
    point = measure(made([0.6], [0.6], [0.6]), Confidence(0.9))
    assert point.exit_accuracy == (None, None, 1.0)
    assert point.layer_ratio == 1.0


def test_nan_never_leaves_early():
    recording = made([0.9, math.nan], [0.9, 0.9], [0.9, 0.9])
    assert replay(recording, Confidence(0.5)).tolist() == [0, 1]


def test_a_policy_for_another_model_is_refused(recording):
    with pytest.raises(ValueError, match="2 entries, the model has 4"):
        replay(recording, Confidence([0.5, 0.6]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_exits", "num_classes"), [(1, 2), (8, 1000)])
def test_candidates_fit_the_model(kind, num_exits, num_classes):
    policies = candidates(kind, num_exits, num_classes)
    assert all(type(policy) is KINDS[kind] for policy in policies)
    assert len(set(map(str, policies))) == len(policies)
    for policy in policies:
        policy.check(num_exits)
        assert getattr(policy, "patience", 1) <= num_exits
    assert policies


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'luck', expected one of confidence"):
        candidates("luck", 4, 10)


def test_choose_takes_the_fastest_within_tolerance(recording):
    points = sweep(recording, [c for kind in KINDS for c in candidates(kind, 4, 7)])
    for tolerance in (0.0, 5.0, 100.0):
        chosen = choose(points, recording.final_accuracy, tolerance)
        floor = recording.final_accuracy - tolerance / 100
        allowed = [p.layer_ratio for p in points if p.accuracy >= floor - 1e-9]
        assert (chosen.layer_ratio if chosen else None) == max(allowed, default=None)


def test_choose_finds_nothing_among_points_that_all_lose():
    recording = made([0.9, 0.1], [0.9, 0.1], [0.9, 0.9])
    assert choose(sweep(recording, [Confidence(0.5)]), recording.final_accuracy, 1.0) is None


def test_curves_vary_one_number_each(recording):
    points = sweep(recording, [c for kind in KINDS for c in candidates(kind, 4, 7)])
    found = curves(points)
    assert sorted(p.layer_ratio for group in found.values() for p in group) == sorted(
        p.layer_ratio for p in points
    )
    for group in found.values():
        assert len({type(p.policy) for p in group}) == 1
        varying = [{str(v) for v in values} for values in zip(*map(numbers, group), strict=True)]
        assert sum(len(values) > 1 for values in varying) == 1
        assert [p.layer_ratio for p in group] == sorted(p.layer_ratio for p in group)


def numbers(point):
    described = describe(point.policy)
    return [described[name] for name in sorted(described)]


def test_a_policy_is_described_by_its_numbers():
    described = describe(PatientConfident([0.5, 0.4], 2))
    assert described == {"name": "PatientConfident", "threshold": [0.5, 0.4], "patience": 2}


@pytest.mark.parametrize("lead", [0, 12], ids=["hardly sure", "nearly certain"])
@pytest.mark.parametrize("kind", ["confidence", "entropy", "patient_confident"])
def test_thresholds_lie_where_the_models_answers_do(kind, lead):
    # all confidences between 0.1 and 0.2, or above 0.9999
    logits = torch.randn(4, 200, 10, generator=torch.Generator().manual_seed(0)) / 10
    logits[..., 0] += lead
    found = Recording(logits, torch.zeros(200, dtype=torch.long), (1, 2, 3, 4))

    def depths(policies):
        return {point.layer_ratio for point in sweep(found, policies)}

    assert len(depths(candidates(kind, 3, 10))) <= 4
    assert len(depths(candidates(kind, 3, 10, found))) >= 8
