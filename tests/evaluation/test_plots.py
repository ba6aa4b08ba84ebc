"""What the pictures show: drawn from what was recorded, nothing without its picture or its curve."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from lgvit_fast import Confidence, Replay
from lgvit_fast.bench.model import Row, speedup_figure
from lgvit_fast.data import Digits, ImageSource, InputSpec, eval_transform, open_dataset
from lgvit_fast.evaluation import evaluate, measure
from lgvit_fast.evaluation.examples import pick_examples
from lgvit_fast.evaluation.plots import exits_figure, tradeoff_figure
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(exits=4, num_classes=10)


@pytest.fixture(scope="module")
def digits(model):
    return Digits("validation", InputSpec.of(model.backbone))


@pytest.fixture(scope="module")
def evaluation(model, digits):
    return evaluate(model, digits, policy=Confidence(0.6), timing_batches=(), timing_images=3)


def rows_of(figure):
    """How many pictures stand beside each exit that is named, top to bottom."""
    named = [t for t in figure.texts if t.get_text().startswith("after block")]
    middles = [(a.get_position().y0 + a.get_position().y1) / 2 for a in figure.axes]
    return [sum(abs(y - text.get_position()[1]) < 1e-6 for y in middles) for text in named]


def test_every_exit_that_is_named_has_pictures(evaluation, model, digits):
    # one image alone leaves at exit 1, and none of the few that are timed
    script = torch.full((len(digits),), 4)
    script[7], script[100:] = 1, 2
    recording = evaluation.recording
    policy = Replay(script)
    rare = replace(
        evaluation,
        chosen=measure(recording, policy),
        examples=pick_examples(recording, policy, digits),
    )
    figure = exits_figure(rare, digits.spec, model.class_names)
    assert rows_of(figure) == [1, 12, 12]


def test_examples_are_what_infer_answers(evaluation, model):
    examples, policy = evaluation.examples, evaluation.chosen.policy
    answer = model.infer(examples.images, policy)
    assert torch.equal(answer.exit_index, examples.exit_index)
    assert torch.equal(answer.prediction, examples.prediction)
    assert set(examples.exit_index.tolist()) == {
        index for index, share in enumerate(evaluation.chosen.shares) if share
    }
    for index in examples.exit_index.unique():
        assert (examples.exit_index == index).sum() <= 12


def test_wrong_answers_are_few_but_shown(evaluation, digits):
    recording = replace(evaluation.recording, targets=evaluation.recording.logits[-1].argmax(-1))
    targets = recording.targets.clone()
    targets[::20] = (targets[::20] + 1) % 10
    recording = replace(recording, targets=targets)
    never = Confidence(1.0)  # all run to the end, where one of twenty is wrong
    examples = pick_examples(recording, never, digits)
    assert examples.right.tolist() == [True] * 10 + [False] * 2


def test_drawing_does_not_run_the_model(evaluation, digits, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr("lgvit_fast.LGViT.infer", refuse)
    monkeypatch.setattr("lgvit_fast.LGViT.forward_exits", refuse)
    assert exits_figure(evaluation, digits.spec).axes
    assert tradeoff_figure(evaluation).axes


def test_unreadable_files_do_not_shift_the_pictures(model, tmp_path):
    for number, name in enumerate("abcde"):
        (tmp_path / name).mkdir()
        for place in range(3):
            Image.new("RGB", (32, 32), (50 * number, 20 * place, 90)).save(
                tmp_path / name / f"{place}.png"
            )
    for bad in ("a/0.png", "c/1.png"):
        (tmp_path / bad).write_text("no image")
    spec = InputSpec.of(model.backbone)
    source = ImageSource(open_dataset(str(tmp_path)), eval_transform(spec))
    found = evaluate(model, source, policy=Confidence(0.6), timing_batches=())
    assert len(found.recording.bad) == 2
    answer = model.infer(found.examples.images, found.chosen.policy)
    assert torch.equal(answer.prediction, found.examples.prediction)
    assert torch.equal(answer.exit_index, found.examples.exit_index)


def test_the_legend_names_only_curves_that_are_seen(evaluation):
    point = evaluation.points[0]
    here = replace(point, policy=Confidence(0.5), accuracy=evaluation.recording.final_accuracy)
    chosen = replace(here, accuracy=0.9)
    far = [replace(p, policy=Replay([0]), accuracy=0.01) for p in evaluation.points[:2]]
    figure = tradeoff_figure(replace(evaluation, points=[here, *far, chosen], chosen=chosen))
    recording = replace(evaluation.recording)
    seen = tradeoff_figure(
        replace(evaluation, recording=recording, points=[chosen, *far], chosen=chosen)
    )
    for drawn in (figure, seen):
        (axes,) = drawn.axes
        low, high = axes.get_ylim()
        left, right = axes.get_xlim()
        named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
        for line in named:
            places = zip(*line.get_data(), strict=True)
            flat = len(set(line.get_ydata())) == 1  # the final classifier's accuracy, across
            assert any(low <= y <= high and (flat or left <= x <= right) for x, y in places)
        labels = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert len(labels) == len(named) + 1  # and the chosen policy with its interval


def test_no_line_runs_through_a_number():
    numbers = dict.fromkeys(Row.__dataclass_fields__, 1.0)
    row = Row(**{**numbers, "way": "dense", "like": "dense"})
    # the label of this bar stands where the dashed line is
    rows = [row, replace(row, way="engine", speedup=1.9, layer_ratio=2.0)]
    (axes,) = speedup_figure(rows).axes
    (line,) = axes.get_lines()
    assert len(axes.texts) == 2
    for text in axes.texts:
        box = text.get_bbox_patch()
        assert (
            box is not None
            and box.get_facecolor()[:3] == (1, 1, 1)
            and box.get_alpha() in (None, 1)
        )
        assert text.get_zorder() > line.get_zorder()
