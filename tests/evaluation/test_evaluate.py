"""A whole evaluation and its pictures."""

import json

import pytest
import torch
from PIL import Image

from lgvit_fast import Confidence
from lgvit_fast.data import Digits, InputSpec
from lgvit_fast.evaluation import candidates, evaluate, sweep
from lgvit_fast.evaluation.plots import denormalise, plot_exits, plot_tradeoff
from lgvit_fast.evaluation.tradeoff import KINDS
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(exits=4, num_classes=10)


@pytest.fixture(scope="module")
def digits(model):
    return Digits("validation", InputSpec.of(model.backbone))


@pytest.fixture(scope="module")
def evaluation(model, digits):
    return evaluate(
        model, digits, kinds=tuple(KINDS), timing_batches=(7, 32), timing_images=40, timing_rounds=1
    )


def test_it_covers_every_image_policy_and_batch_size(evaluation, digits):
    assert len(evaluation.recording) + evaluation.selection_images == len(digits)
    assert abs(len(evaluation.recording) - evaluation.selection_images) <= 1
    swept = {type(point.policy) for point in evaluation.points}
    assert swept == set(KINDS.values())
    assert [timing.batch_size for timing in evaluation.timings] == [7, 32]
    assert len(evaluation.sample.targets) == 40
    assert len(evaluation.sample.targets.unique()) > 5  # at random, not the first ones


def test_the_report_is_json(evaluation):
    report = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert report["chosen"]["within_tolerance"] is evaluation.within
    assert len(report["points"]) == len(evaluation.points)
    assert report["timings"][1]["ratio"]["median"] > 0
    assert report["machine"]["torch"] == torch.__version__


def test_a_given_policy_is_reported_as_it_is(model, digits):
    policy = Confidence([0.9, 0.8, 0.7, 0.6])
    evaluation = evaluate(model, digits, policy=policy, timing_batches=())
    assert evaluation.chosen.policy == policy
    assert evaluation.selection_images == 0 and len(evaluation.recording) == len(digits)
    assert evaluation.timings == []


def test_if_every_policy_loses_too_much_the_most_accurate_is_taken(model, digits):
    evaluation = evaluate(model, digits, tolerance=-100, timing_batches=())
    assert not evaluation.within
    first, _ = evaluate(model, digits, policy=Confidence(), timing_batches=()).recording.split(0)
    points = {
        str(p.policy): p.accuracy for p in sweep(first, candidates("confidence", 4, 10, first))
    }
    assert points[str(evaluation.chosen.policy)] == max(points.values())


def test_it_reports_on_images_that_had_no_part_in_the_choice(model, digits):
    one, two = (evaluate(model, digits, seed=seed, timing_batches=()) for seed in (0, 1))
    everything = evaluate(model, digits, policy=Confidence(), timing_batches=()).recording
    for seed, evaluation in ((0, one), (1, two)):
        reported = evaluation.recording.logits
        assert torch.equal(reported, everything.split(seed)[1].logits)
    low, high = one.chosen.accuracy_interval
    assert low < one.chosen.accuracy < high
    assert one.to_dict()["chosen"]["accuracy_interval"] == (low, high)


def test_relabel_reaches_recording_and_sample(model, digits):
    evaluation = evaluate(model, digits, timing_batches=(), relabel=lambda t: 9 - t)
    plain = evaluate(model, digits, timing_batches=())
    assert torch.equal(evaluation.recording.targets, 9 - plain.recording.targets)
    assert torch.equal(evaluation.sample.targets, 9 - plain.sample.targets)


@pytest.mark.parametrize("draw", ["tradeoff", "exits"])
def test_pictures_are_png_of_readable_size(evaluation, model, tmp_path, draw):
    path = tmp_path / "sub" / "picture.png"
    if draw == "tradeoff":
        plot_tradeoff(evaluation, path, "title")
    else:
        plot_exits(evaluation, path, InputSpec.of(model.backbone))
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 900
    assert path.stat().st_size < 200_000


def test_denormalise_undoes_the_preprocessing(digits):
    batch = digits.__getitems__([(0, 0), (0, 1)])
    pictures = denormalise(batch.images, digits.spec)
    assert pictures.shape == (2, 32, 32, 3)
    assert float(pictures.min()) == 0
    mean, std = torch.tensor(digits.spec.mean), torch.tensor(digits.spec.std)
    torch.testing.assert_close(((pictures - mean) / std).permute(0, 3, 1, 2), batch.images)
