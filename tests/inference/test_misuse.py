"""What an engine refuses, and what it warns of."""

import copy
import logging
import pickle

import pytest
import torch

import lgvit_fast
from lgvit_fast import Confidence, Engine, Entropy, Patience, PatientConfident, Replay
from tests.helpers import images, tiny_model, tiny_vit


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copying_an_engine_says_what_to_do_instead(attempt):
    with pytest.raises(TypeError, match=r"an Engine cannot be copied or pickled.*make an Engine"):
        attempt(Engine(tiny_model(exits=4), 4))


@pytest.mark.parametrize("kind", [Confidence, Entropy, PatientConfident])
def test_thresholds_for_the_exits_asked(kind):
    model = tiny_model(exits=[1, 2, 3, 4])
    engine = Engine(model, 8, exits=[2, 4])
    batch = images(8)
    never = 1.0 if kind is Confidence else 0.0
    for thresholds in ([0.3, 0.5], [0.45, 0.2]):
        got = engine(batch, kind(thresholds))
        expected = engine(batch, kind([never, thresholds[0], never, thresholds[1]]))
        torch.testing.assert_close(got.logits, expected.logits)
        assert torch.equal(got.exit_layer, expected.exit_layer)
    assert set(got.exit_layer.tolist()) <= {2, 4, 6}
    answers = list(lgvit_fast.stream(engine, [batch], 4, policy=kind(thresholds)))
    assert [answer.exit_layer for answer in answers] == got.exit_layer.tolist()


def test_thresholds_for_neither_are_refused():
    engine = Engine(tiny_model(exits=[1, 2, 3, 4]), 8, exits=[2, 4])
    with pytest.raises(ValueError, match="threshold has 3 entries, the model has 4 exits"):
        engine(images(2), Confidence([0.5, 0.6, 0.7]))


def test_policies_without_thresholds_for_each_exit_stay_as_they_are():
    for policy in (Confidence(0.5), Patience(2), Replay([0, 1]), Confidence([0.1, 0.2, 0.3])):
        assert policy.for_all_exits([0, 2], 3) is policy
    assert Confidence([0.1, 0.2]).for_all_exits([0, 2], 3).threshold[::2] == [0.1, 0.2]


@pytest.fixture
def warnings(caplog):
    """The warnings logged so far."""
    caplog.set_level(logging.WARNING, "lgvit_fast")
    return lambda: [r.getMessage() for r in caplog.records if "never trained" in r.getMessage()]


def test_untrained_exits_are_warned_of_once(warnings):
    model = lgvit_fast.LGViT(tiny_vit(), exits=[2, 4]).eval()
    assert model.untrained_exits == (2, 4)
    Engine(model, 4)(images(2), Replay([0, 1]))  # scripted: the heads decide nothing
    assert warnings() == []
    for _ in range(2):
        engine = Engine(model, 4)
        engine(images(2))
        engine(images(2))
        list(lgvit_fast.stream(model, [images(2)], 2))
    assert len(warnings()) == 1
    assert "exits after blocks 2, 4 were never trained" in warnings()[0]


def test_one_step_of_training_is_enough(warnings, tmp_path):
    model = lgvit_fast.LGViT(tiny_vit(), exits=[2, 4], heads=["linear", "gah_2"])
    out = model.train()(images(4))
    torch.nn.functional.cross_entropy(out.exits[1], torch.arange(4)).backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    assert model.untrained_exits == (2,)
    model.save_pretrained(tmp_path)
    assert lgvit_fast.LGViT.from_pretrained(tmp_path).untrained_exits == (2,)
    torch.nn.functional.cross_entropy(model(images(4)).exits[0], torch.arange(4)).backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    Engine(model.eval(), 4)(images(2))
    assert warnings() == []
    model.reset_classifier(3)
    assert model.untrained_exits == (2, 4)
