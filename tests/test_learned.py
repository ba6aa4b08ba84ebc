"""The learned rule: the same in every backend, way and batch; its state travels with its image."""

import json

import numpy as np
import pytest
import torch

import lgvit_fast
from lgvit_fast import Engine, Learned, policies, stream
from lgvit_fast.evaluation import Recording, record, replay
from lgvit_fast.evaluation.learning import fit_learned
from lgvit_fast.evidence import INPUTS, evidence, log_softmax
from lgvit_fast.ops.exit_step import ExitStep, apply_rule
from tests.helpers import images, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(exits=4)


@pytest.fixture(scope="module")
def policy(model):
    recording = record(model, images(120, seed=5).split(40))
    fitted = fit_learned(recording)
    scores = []
    state = fitted.start(120, torch.device("cpu"))
    for index in range(4):
        logits = recording.logits[index]
        step = ExitStep(logits, *apply_rule(fitted.rule(index), logits, state[:, :2]))
        scores.append(fitted.score(step, state, index)[1])
    middle = float(torch.stack(scores).quantile(0.7))
    return Learned(
        middle,
        *(getattr(fitted, n) for n in ("coefficients", "mixture", "sharpness", "num_classes")),
    )


@pytest.fixture(scope="module")
def expected(model, policy):
    with lgvit_fast.ops.backend("torch"):
        answer = model.infer(images(40), policy)
    assert len(answer.exit_index.unique()) > 2
    return answer


def assert_same(answer, expected):
    assert torch.equal(answer.exit_index, expected.exit_index)
    assert torch.equal(answer.exit_layer, expected.exit_layer)
    assert torch.equal(answer.nonfinite, expected.nonfinite)
    torch.testing.assert_close(answer.logits, expected.logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", ["cpp", "auto"])
def test_every_backend_says_the_same(model, policy, expected, backend):
    with lgvit_fast.ops.backend(backend):
        assert_same(model.infer(images(40), policy), expected)


@pytest.mark.parametrize("graphs", [False, "eager"])
def test_the_engine_says_the_same(model, policy, expected, graphs):
    engine = Engine(model, max_batch=16, graphs=graphs)
    assert_same(engine(images(40), policy), expected)
    left = torch.bincount(expected.exit_index, minlength=5).tolist()
    assert list(engine.report().left) == left


def test_the_stream_says_the_same_and_counts(model, policy, expected):
    running = stream(model, images(40).split(7), 8, policy=policy)
    answers = list(running)
    assert [a.exit_index for a in answers] == expected.exit_index.tolist()
    logits = torch.stack([a.logits for a in answers])
    torch.testing.assert_close(logits, expected.logits, atol=2e-4, rtol=2e-4)
    assert list(running.report().left) == torch.bincount(expected.exit_index, minlength=5).tolist()


def test_images_on_their_way_have_not_left(model, policy):
    running = stream(model, images(40).split(7), 8, policy=policy, order="completion")
    given = [next(running) for _ in range(5)]
    finished = sum(running.report().left)
    rest = running.close()
    assert finished == len(given) + len(rest) == sum(running.report().left)


def test_replay_says_the_same(model, policy, expected):
    recording = record(model, images(40).split(16))
    assert replay(recording, policy).tolist() == expected.exit_index.tolist()


def test_alone_or_in_any_batch(model, policy, expected):
    for place in (0, 7, 39):
        alone = model.infer(images(40)[place : place + 1], policy)
        assert int(alone.exit_index) == int(expected.exit_index[place])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = model.infer(images(40)[order], policy)
    assert torch.equal(shuffled.exit_index, expected.exit_index[order])


def test_the_exits_answer_together(model, policy):
    """By hand: the weighted sum of log-probabilities, scaled."""
    outputs = model.forward_exits(images(40))
    answer = model.infer(images(40), policy)
    total = torch.zeros(40, 7)
    for index, logits in enumerate(outputs.exits):
        total = total + policy.mixture[index] * logits.log_softmax(-1)
        here = answer.exit_index == index
        together = policy.sharpness[index] * total[here]
        torch.testing.assert_close(answer.logits[here], together, atol=2e-4, rtol=2e-4)
    here = answer.exit_index == 4
    torch.testing.assert_close(answer.logits[here], outputs.final[here], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_stays_for_this_exit_and_harms_no_other(policy, bad):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator) * 3
    state = policy.start(3, torch.device("cpu"))
    untouched = policy.start(3, torch.device("cpu"))
    broken = logits.clone()
    broken[0, 1, 2] = bad
    for index in range(2):
        first = ExitStep(
            broken[index], *apply_rule(policy.rule(index), broken[index], state[:, :2])
        )
        found = policy.decide(first, state, index)
        other = ExitStep(
            logits[index], *apply_rule(policy.rule(index), logits[index], untouched[:, :2])
        )
        clean = policy.decide(other, untouched, index)
        assert found.leave[[0, 2]].tolist() == clean.leave[[0, 2]].tolist()
        if index == 0:
            assert not found.leave[1]
    assert torch.isfinite(state[1, 2:].view(torch.float32)).all()


def test_numpy_gives_what_torch_gives(policy):
    """A deployed model calls the same code with arrays."""
    logits = (torch.randn(4, 30, 7, generator=torch.Generator().manual_seed(2)) * 4).unbind()
    state = policy.start(30, torch.device("cpu"))
    array = state.numpy().copy()
    for index, exit_logits in enumerate(logits):
        leave, valid = apply_rule(policy.rule(index), exit_logits, state[:, :2])
        array[:, :2] = state[:, :2].numpy()
        theirs = ExitStep(exit_logits.numpy(), leave.numpy(), valid.numpy())
        ours = policy.decide(ExitStep(exit_logits, leave, valid), state, index)
        theirs = policy.decide(theirs, array, index)
        np.testing.assert_array_equal(theirs.leave, ours.leave.numpy())
        np.testing.assert_allclose(theirs.logits, ours.logits.numpy(), rtol=1e-5, atol=1e-5)
        assert theirs.logits.dtype == np.float32


def test_inputs_by_hand():
    log_p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    other = log_softmax(torch.tensor([[0.0, 1.0, 0.0], [3.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    values = evidence(log_p, other, torch.tensor([1, 3, 0]))
    assert len(values) == len(INPUTS)
    odds, margin, entropy = values[:3]
    torch.testing.assert_close(odds[:2], torch.tensor([0.7 / 0.3, 1.0]).log(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(margin[:2], torch.tensor([3.5, 1.0]).log(), atol=1e-5, rtol=1e-5)
    assert float(odds[2]) == pytest.approx(16, abs=0.1) and float(margin[2]) == 16
    assert float(entropy[1]) == pytest.approx(np.log(2)) and float(entropy[2]) == 0
    torch.testing.assert_close(values[6], torch.tensor([1.0, 3.0, 1.0]).log())
    assert values[7].tolist() == [0.0, 1.0, 1.0]


def test_json_and_back(policy):
    again = policies.from_dict(json.loads(json.dumps(policies.to_dict(policy))))
    assert policies.to_dict(again) == policies.to_dict(policy)
    assert isinstance(again, Learned)


ROW = [0.0] * (1 + len(INPUTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, [], [], [], 3), "coefficients"),
        ((0.0, [[1.0]], [1.0], [1.0], 3), "expected 9 for each exit"),
        ((0.0, [ROW], [1.0, 1.0], [1.0], 3), "mixture has 2"),
        ((float("nan"), [ROW], [1.0], [1.0], 3), "finite"),
    ],
    ids=["no exits", "row", "mixture", "nan"],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Learned(*arguments)


def test_another_model_is_refused(policy):
    with pytest.raises(ValueError, match="4 exits, the model has 3"):
        tiny_model(exits=3).policy = policy
    with pytest.raises(ValueError, match="7 classes, the model has 5"):
        tiny_model(exits=4, num_classes=5).infer(images(2), policy)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3], ids=str)
@pytest.mark.parametrize("noise", [0.0, 3.0], ids=["exits equal", "exits differ"])
def test_any_recording_can_be_fitted(scale, noise):
    draw = torch.Generator().manual_seed(0)
    final = torch.randn(60, 5, generator=draw)
    exits = [final + noise * torch.randn(60, 5, generator=draw) for _ in range(3)]
    logits = scale * torch.stack((*exits, final))
    fitted = fit_learned(Recording(logits, None, (2, 4, 6, 8)))
    numbers = torch.tensor([fitted.mixture, fitted.sharpness])
    assert numbers.isfinite().all() and (numbers > 0).all()
