"""Calibration: the guarantee, counted on draws from a known population; goals; what is refused."""

import math
import time

import numpy as np
import pytest
import torch
from scipy import stats

import lgvit_fast
from lgvit_fast import Certificate, Confidence, Learned, policies
from lgvit_fast.data.batches import Batch
from lgvit_fast.evaluation import Recording, calibrate, measure, replay
from lgvit_fast.evaluation.calibration import Outcomes, walk
from lgvit_fast.evaluation.families import CERTIFIED_KINDS, Scores, family
from lgvit_fast.evaluation.tradeoff import answers
from lgvit_fast.inference.planner import Costs
from tests.helpers import images, tiny_model

LAYERS = (2, 4, 6, 8)


def population(size, seed=0):
    """Scores, outcomes and layers of images that are harder or easier, in three exits."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(size=size)
    right_in_full = rng.random(size) < 1 / (1 + np.exp(hardness - 2.2))
    scores, right = [], []
    for exit in range(3):
        chance = 1 / (1 + np.exp(1.4 * hardness - 1.3 - 0.5 * exit))
        follows = rng.random(size) < 0.75
        right.append(
            np.where(
                follows,
                right_in_full & (rng.random(size) < chance + 0.25),
                rng.random(size) < chance,
            )
        )
        scores.append(chance + rng.normal(size=size) * 0.12)
    right = torch.tensor(np.stack([*right, right_in_full]))
    return torch.tensor(np.stack(scores), dtype=torch.float32), right


def outcomes_of(scores, right):
    return Outcomes(
        Scores(scores, torch.zeros(4, scores.shape[1], dtype=torch.int64)),
        right[-1] & ~right,
        right & ~right[-1],
        right != right[-1],
    )


def layers_of(scores, threshold):
    return torch.tensor(LAYERS)[scores.exits(threshold)].double().mean()


GOALS = {"max_drop": 2.0, "min_agreement": 93.0}


@pytest.fixture(scope="module")
def calibrations():
    """500 calibrations each, on images drawn anew, and what is true of what they chose."""
    scores, right = population(200_000)
    whole = outcomes_of(scores, right)
    draw = torch.Generator().manual_seed(1)
    results = {goal: [] for goal in GOALS}
    began = time.perf_counter()
    for _ in range(500):
        drawn = torch.randint(scores.shape[1], (1200,), generator=draw)
        first, second = drawn[:600], drawn[600:]
        path = Scores(scores[:, first], torch.zeros(4, 600, dtype=torch.int64)).path(LAYERS)[::5]
        tested = outcomes_of(scores[:, second], right[:, second])
        for goal, limit in GOALS.items():
            passed = walk(tested, path, goal, limit, 0.1)
            results[goal].append(path[passed - 1] if passed else math.inf)
    print(f"\n1,000 calibrations in {time.perf_counter() - began:.1f} s")
    return whole, results


def truth(whole, goal, threshold):
    ((losses, gains, others),) = whole.counts([threshold])
    size = whole.losses.shape[1]
    return 100 * (losses - gains) / size if goal == "max_drop" else 100 * (1 - others / size)


def true_values(whole, goal, thresholds):
    """What is true of each threshold; many calibrations choose neighbours, so on a fine grid."""
    grid = np.unique(np.quantile(thresholds, np.linspace(0, 1, 40), method="nearest"))
    values = np.array([truth(whole, goal, t) for t in grid])
    return np.interp(thresholds, grid, values)


@pytest.mark.parametrize("goal", GOALS)
def test_the_goal_is_broken_no_more_often_than_was_promised(calibrations, goal):
    whole, results = calibrations
    chosen = np.array(results[goal])
    moved = np.isfinite(chosen)
    values = true_values(whole, goal, chosen[moved])
    sign = 1 if goal == "max_drop" else -1
    violations = int((sign * values > sign * GOALS[goal]).sum())
    print(f"{goal}: {violations} of 500 break the goal, 50 allowed on average; {moved.sum()} moved")
    assert moved.sum() > 400  # it is no guarantee if nobody ever leaves
    assert violations <= stats.binom.ppf(1 - 1e-6, 500, 0.1)


@pytest.mark.parametrize("goal", GOALS)
def test_what_the_guarantee_costs_in_layers(calibrations, goal):
    """Beside an oracle: the boldest threshold that keeps the goal in the whole population."""
    whole, results = calibrations
    grid = np.quantile(whole.scores.values.numpy(), np.linspace(0.02, 0.999, 50))
    sign = 1 if goal == "max_drop" else -1
    kept = [t for t in grid if sign * truth(whole, goal, t) <= sign * GOALS[goal]]
    oracle = min(float(layers_of(whole.scores, t)) for t in kept)
    sample = results[goal][::25]
    layers = np.mean([float(layers_of(whole.scores, t)) for t in sample])
    print(f"{goal}: {layers:.2f} mean layers, an oracle {oracle:.2f}, nobody leaving {LAYERS[-1]}")
    assert oracle < layers < LAYERS[-1]
    assert layers - oracle < 0.5 * (LAYERS[-1] - oracle)


@pytest.fixture(scope="module")
def recording():
    """2,400 images of 5 classes in 4 exits, the deeper the surer."""
    rng = torch.Generator().manual_seed(3)
    targets = torch.randint(5, (2400,), generator=rng)
    ease = torch.rand(2400, generator=rng) * 5
    truth = torch.nn.functional.one_hot(targets, 5).float()
    noise = torch.randn(5, 2400, 5, generator=rng).cumsum(0) / torch.arange(1, 6)[:, None, None]
    strength = torch.tensor([0.8, 1.1, 1.4, 1.7, 2.2])[:, None, None] * ease[:, None]
    return Recording(truth * strength + noise, targets, (2, 3, 4, 5, 6))


@pytest.mark.parametrize("kind", CERTIFIED_KINDS)
def test_scores_say_what_replay_says(recording, kind):
    first, second = recording.split(0)
    made = family(kind, first)
    scores = made.scores(second)
    path = scores.path(second.layers)
    assert len(path) > (2 if "patien" in kind else 20)
    for threshold in path[:: max(1, len(path) // 6)]:
        exits, predictions = answers(second, made.make(threshold))
        assert torch.equal(exits, scores.exits(threshold))
        assert torch.equal(predictions, scores.predictions.gather(0, exits[None])[0])


@pytest.mark.parametrize("kind", CERTIFIED_KINDS)
def test_paths_go_from_cautious_to_bold(recording, kind):
    scores = family(kind, recording).scores(recording)
    layers = [
        float(layers_of_recording(recording, scores, t)) for t in scores.path(recording.layers)
    ]
    assert layers == sorted(layers, reverse=True)
    assert layers[-1] == pytest.approx(2 if kind != "patient_confident" else 3, abs=0.1)
    if "patien" not in kind:
        assert max(-np.diff([6.0, *layers])) < 0.2


def layers_of_recording(recording, scores, threshold):
    return torch.tensor(recording.layers)[scores.exits(threshold)].double().mean()


@pytest.mark.parametrize("kind", ["confidence", "entropy", "learned"])
@pytest.mark.parametrize("goal", [{"max_drop": 2}, {"min_agreement": 95}], ids=str)
def test_the_held_out_half_speaks_for_the_policy(recording, kind, goal):
    found = calibrate(recording, **goal, kind=kind)
    held_out = recording.split(0)[1]
    assert found.curve[0].layer_ratio == 1
    point = measure(held_out, found.policy)
    assert point.layer_ratio > 1.1
    assert found.certificate.exit_counts == tuple(
        torch.bincount(replay(held_out, found.policy), minlength=5).tolist()
    )
    assert found.expected.accuracy.value == pytest.approx(100 * point.accuracy)
    assert found.expected.layers.value == pytest.approx(6 / point.layer_ratio)
    for figure in (found.expected.accuracy, found.expected.drop, found.expected.layers):
        assert figure.low <= figure.value <= figure.high
    assert found.certificate.bound == next(iter(goal.values()))
    assert found.certificate.images == found.certificate.selection_images == 1200


def test_labels_are_not_needed_for_agreement(recording):
    unlabelled = Recording(recording.logits, None, recording.layers)
    found = calibrate(unlabelled, min_agreement=95, kind="learned")
    assert found.expected.accuracy is None and found.expected.drop is None
    assert found.expected.agreement.value > 95
    assert found.curve[0].accuracy is None


def test_another_seed_holds_out_other_images(recording):
    one, same, other = (calibrate(recording, max_drop=2, seed=s) for s in (0, 0, 1))
    assert one.policy == same.policy and one.expected == same.expected
    assert one.expected != other.expected
    assert one.certificate.data == other.certificate.data


def test_a_tighter_goal_or_more_confidence_is_more_cautious(recording):
    def layers(**goal):
        return calibrate(recording, **goal).expected.layers.value

    assert layers(max_drop=4) < layers(max_drop=1.5)
    assert layers(max_drop=2, confidence=0.5) < layers(max_drop=2, confidence=0.999)


def test_budgets_certify_nothing(recording):
    found = calibrate(recording, budget_layers=3.5)
    assert found.certificate.bound is None
    assert "nothing is certified" in str(found.certificate)
    assert found.expected.layers.value == pytest.approx(3.5, abs=0.2)
    costs = Costs((1, 32), (0.0, 0.0), (((0.001, 0.032),) * 5), (((0.0, 0.0),) * 5))
    timed = calibrate(recording, budget_ms=2.5, costs=costs)
    assert timed.expected.ms.value == pytest.approx(2.5, abs=0.15)
    assert timed.expected.ms.low < timed.expected.ms.value < timed.expected.ms.high


def test_a_goal_that_no_candidate_keeps_lets_nobody_leave(recording):
    logits = recording.logits.clone()
    logits[:-1] = torch.randn(4, 2400, 5, generator=torch.Generator().manual_seed(0)) * 3
    found = calibrate(Recording(logits, recording.targets, recording.layers), max_drop=1)
    assert found.policy == Confidence(1.0)
    assert found.certificate.bound == 0
    assert "No policy" in found.certificate.note
    assert replay(recording, found.policy).unique().tolist() == [4]


def test_few_images_are_told_how_many_it_takes(recording):
    small = Recording(recording.logits[:, :300], recording.targets[:300], recording.layers)
    with pytest.raises(
        ValueError, match=r"max_drop=1 .* 150 held-out images .* about (\d+)"
    ) as error:
        calibrate(small, max_drop=1)
    needed = int(str(error.value).split("about ")[1].split()[0])
    assert 600 < needed < 1600


def bad(**changes):
    def change(recording):
        values = {
            "logits": recording.logits,
            "targets": recording.targets,
            "layers": recording.layers,
        }
        return Recording(**{**values, **{k: v(recording) for k, v in changes.items()}})

    return change


def with_nan(recording):
    logits = recording.logits.clone()
    logits[1, 5, 2] = math.nan
    return logits


def same(recording):
    return recording


NO_LABELS = bad(targets=lambda r: None)
ONE_CLASS = bad(targets=lambda r: torch.ones_like(r.targets))
NINETEEN = bad(logits=lambda r: r.logits[:, :19], targets=lambda r: r.targets[:19])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        pytest.param(same, {}, "goals given: none; expected exactly one", id="no goal"),
        pytest.param(
            same, {"max_drop": 1, "budget_layers": 4}, "max_drop=1, budget_layers=4", id="two goals"
        ),
        pytest.param(same, {"max_drop": 0}, "max_drop=0, expected a number between", id="drop 0"),
        pytest.param(same, {"max_drop": 100}, "between 0 and 100", id="drop 100"),
        pytest.param(same, {"min_agreement": 101}, "between 0 and 100", id="agreement 101"),
        pytest.param(same, {"max_drop": math.nan}, "max_drop=nan", id="drop nan"),
        pytest.param(same, {"budget_layers": -1}, "expected a number above 0", id="budget -1"),
        pytest.param(same, {"budget_layers": 1.5}, "the boldest policy takes 2", id="budget 1.5"),
        pytest.param(same, {"budget_ms": 1}, "budget_ms needs costs", id="no costs"),
        pytest.param(same, {"max_drop": 1, "confidence": 95}, "confidence=95", id="confidence"),
        pytest.param(
            same, {"max_drop": 1, "kind": "luck"}, "'luck' cannot be certified", id="unknown kind"
        ),
        pytest.param(
            same, {"max_drop": 1, "kind": "replay"}, "expected one of confidence", id="replay"
        ),
        pytest.param(NO_LABELS, {"max_drop": 1}, "max_drop needs targets", id="no labels"),
        pytest.param(ONE_CLASS, {"max_drop": 1}, "all targets are class 1", id="one class"),
        pytest.param(NINETEEN, {"max_drop": 1}, "19 images, expected at least 20", id="19 images"),
        pytest.param(
            bad(logits=with_nan), {"max_drop": 1}, "1 of 2400 images hold NaN", id="NaN logits"
        ),
    ],
)
def test_bad_input(recording, change, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(change(recording), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad(layers=lambda r: (2, 3, 4, 5)), "expected 5 increasing"),
        (bad(layers=lambda r: (2, 3, 3, 5, 6)), "increasing"),
        (bad(targets=lambda r: r.targets[:5]), r"expected \[2400\] integers"),
        (bad(targets=lambda r: r.targets.float()), "integers"),
        (bad(targets=lambda r: r.targets + 1), "class number 5, the model has 5"),
        (bad(logits=lambda r: r.logits[0]), r"expected \[E \+ 1, n, K\]"),
        (bad(logits=lambda r: r.logits[:, :0], targets=lambda r: None), "at least one image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "changed",
)
def test_a_recording_must_belong_together(recording, change, message):
    with pytest.raises(ValueError, match=message):
        change(recording)


def test_a_model_and_a_loader_will_do():
    model = tiny_model(exits=3, num_classes=7)
    given, targets = images(60), torch.arange(60) % 7
    pairs = list(zip(given.split(16), targets.split(16), strict=True))
    found = calibrate(model, pairs, min_agreement=80, confidence=0.6, seed=2)
    again = calibrate(
        model, [Batch(*pair, []) for pair in pairs], min_agreement=80, confidence=0.6, seed=2
    )
    assert found.policy == again.policy
    assert found.certificate.model == again.certificate.model is not None
    unlabelled = calibrate(model, given.split(16), min_agreement=80, confidence=0.6, seed=2)
    assert unlabelled.expected.accuracy is None
    with pytest.raises(ValueError, match="data is None"):
        calibrate(model, max_drop=1)
    with pytest.raises(ValueError, match="data is a str"):
        calibrate(model, "photos", max_drop=1)


def calibrated_model(recording, kind="learned"):
    model = tiny_model(exits=[2, 3, 4, 5], num_classes=5)
    found = calibrate(recording, max_drop=2, kind=kind)
    model.policy, model.certificate = found.policy, found.certificate
    return model


@pytest.mark.parametrize("kind", CERTIFIED_KINDS)
def test_policy_and_certificate_are_saved_with_the_model(recording, kind, tmp_path):
    model = calibrated_model(recording, kind)
    model.save_pretrained(tmp_path)
    loaded = lgvit_fast.LGViT.from_pretrained(tmp_path)
    assert loaded.certificate == model.certificate
    assert loaded.certificate is not model.certificate
    given = images(8)
    assert torch.equal(loaded.infer(given).exit_index, model.infer(given).exit_index)
    loaded.policy = Confidence(0.5)
    assert loaded.certificate is None


def test_a_certificate_of_another_model_is_refused(recording, tmp_path):
    found = calibrate(recording, max_drop=2)
    model = tiny_model(exits=[2, 3, 4], num_classes=5)
    model.policy = found.policy
    with pytest.raises(ValueError, match=r"after blocks \[2, 3, 4, 5, 6\] .* this one has"):
        model.certificate = found.certificate
    model = tiny_model(exits=[2, 3, 4, 5], num_classes=5)
    with pytest.raises(ValueError, match="certificate is of policy"):
        model.certificate = found.certificate


def test_a_certificate_of_other_weights_is_refused(tmp_path, caplog):
    model = tiny_model(exits=3, num_classes=7)
    found = calibrate(model, images(60).split(20), min_agreement=80, confidence=0.6)
    model.policy, model.certificate = found.policy, found.certificate
    model.save_pretrained(tmp_path / "a")
    other = tiny_model(exits=3, num_classes=7, seed=1)
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").write_bytes(
        (tmp_path / "b" / "model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="certificate of other weights"):
        lgvit_fast.LGViT.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "c")
    assert "the weights changed" in caplog.text
    assert lgvit_fast.LGViT.from_pretrained(tmp_path / "c").certificate is None


def test_a_certificate_survives_json(recording):
    made = calibrate(recording, max_drop=2, kind="learned").certificate
    import json

    assert Certificate.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    with pytest.raises(ValueError, match="not a certificate"):
        Certificate.from_dict({"goal": "max_drop"})
    assert isinstance(policies.from_dict(made.policy), Learned)
