import copy
import threading

import pytest
import torch
from torch import nn

import lgvit_fast
from lgvit_fast.inference import Engine
from lgvit_fast.inference import engine as engine_module
from lgvit_fast.inference.graphs import CaptureError
from tests.helpers import images, tiny_model

MODES = {
    "plain": {"graphs": False},
    "unprepared": {"graphs": False, "prepare": False},
    "buckets": {"graphs": "eager"},
    "speculative": {"graphs": "eager", "speculate": True},
}
POLICIES = {
    "confidence": lgvit_fast.Confidence(0.5),
    "per exit": lgvit_fast.Confidence([0.6, 0.5, 0.4]),
    "entropy": lgvit_fast.Entropy(1.2),
    "patience": lgvit_fast.Patience(2),
    "patient and confident": lgvit_fast.PatientConfident(1.5, 2),
    "nobody leaves": lgvit_fast.Confidence(1.0),
    "all leave": lgvit_fast.Confidence(0.0),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(exits=[2, 3, 5])


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request):
    return request.param


def assert_same(got, want):
    assert torch.equal(got.exit_index, want.exit_index)
    assert torch.equal(got.exit_layer, want.exit_layer)
    assert torch.equal(got.nonfinite, want.nonfinite)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("batch", [1, 8, 21])
def test_answers_are_those_of_infer(model, mode, policy, batch):
    engine = Engine(model, max_batch=8, **mode)
    assert_same(engine(images(batch), policy), model.infer(images(batch), policy))


def test_no_images(model, mode):
    result = Engine(model, **mode)(images(0))
    assert result.logits.shape == (0, 7)


def test_consecutive_batches_do_not_touch_each_other(model, mode):
    engine = Engine(model, max_batch=8, **mode)
    for seed, batch in enumerate((8, 3, 7, 1, 8, 2)):
        given = images(batch, seed=seed)
        policy = list(POLICIES.values())[seed]
        assert_same(engine(given, policy), model.infer(given, policy))


def test_answers_stay_when_the_next_batch_comes(model, mode):
    engine = Engine(model, max_batch=8, **mode)
    first = engine(images(6))
    kept = copy.deepcopy(first)
    engine(images(8, seed=9))
    assert_same(first, kept)


def test_a_batch_beyond_max_batch_is_answered_in_order(model, mode):
    script = lgvit_fast.Replay(torch.arange(21) % 4)
    result = Engine(model, max_batch=8, **mode)(images(21), script)
    assert result.exit_index.tolist() == [i % 4 for i in range(21)]
    assert_same(result, model.infer(images(21), script))


@pytest.mark.parametrize("leftover", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("speculate", [False, True])
def test_padding_is_inert_whatever_it_holds(model, leftover, speculate):
    engine = Engine(model, max_batch=8, graphs="eager", buckets=[8], speculate=speculate)
    engine(images(8).fill_(leftover))  # poisons every row of the buffers
    for buffer in next(iter(engine._runners.values())).tokens:
        buffer.fill_(leftover)
    assert_same(engine(images(3)), model.infer(images(3)))


@pytest.mark.parametrize("speculate", [False, True])
def test_padding_and_waste_are_counted(model, speculate):
    engine = Engine(model, max_batch=8, graphs="eager", buckets=[4, 8], speculate=speculate)
    engine(images(7), lgvit_fast.Replay([0, 0, 0, 0, 0, 1, 3]))
    rows = [(s.images, s.padded, s.wasted) for s in engine.report().segments]
    exact = [(7, 1, 0), (2, 2, 0), (1, 3, 0), (1, 3, 0)]
    behind = [(7, 1, 0), (2, 1, 5), (1, 2, 1), (1, 3, 0)]
    assert rows == (behind if speculate else exact)
    assert [s.layer for s in engine.report().segments] == [2, 3, 5, 6]


def test_speculation_stops_once_all_have_left(model):
    engine = Engine(model, max_batch=8, graphs="eager", speculate=True)
    engine(images(4), lgvit_fast.Replay([0] * 4))
    assert [s.runs for s in engine.report().segments] == [1, 1, 0, 0]
    assert engine.report().wasted_share == pytest.approx(4 / 8)


def test_buffers_are_kept_and_released(model):
    engine = Engine(model, max_batch=8, graphs="eager")
    engine(images(8), lgvit_fast.Patience(2))
    runner = next(iter(engine._runners.values()))
    places = [t.data_ptr() for t in (*runner.tokens, runner.ledger.memory)]
    for batch in (3, 8, 1):
        engine(images(batch), lgvit_fast.Patience(2))
    assert next(iter(engine._runners.values())) is runner
    assert places == [t.data_ptr() for t in (*runner.tokens, runner.ledger.memory)]
    engine.release()
    assert not engine._runners
    assert_same(engine(images(3)), model.infer(images(3)))


def test_replays_share_buffers_and_other_rules_do_not(model):
    engine = Engine(model, max_batch=4, graphs="eager")
    for exits in ([0, 1], [3, 2], [1, 1]):
        engine(images(2), lgvit_fast.Replay(exits))
    assert len(engine._runners) == 1
    engine(images(2), lgvit_fast.Confidence(0.3))
    assert len(engine._runners) == 2
    for threshold in range(10):
        engine(images(2), lgvit_fast.Entropy(float(threshold)))
    assert len(engine._runners) <= 4


class OnlyEven(lgvit_fast.Policy):
    """A user's own rule: images whose first logit is largest leave, but never at odd exits."""

    def __init__(self, first):
        self.first = first

    def decide(self, step, state, exit_index):
        return step._replace(leave=torch.full_like(step.leave, exit_index >= self.first))


def test_a_policy_of_ones_own(model, mode):
    engine = Engine(model, max_batch=4, **mode)
    for first in (0, 2):
        assert engine(images(3), OnlyEven(first)).exit_index.tolist() == [first] * 3


def test_fewer_exits_keep_their_numbers(model, mode):
    engine = Engine(model, max_batch=8, exits=[3], **mode)
    result = engine(images(4), lgvit_fast.Replay([0, 1, 2, 3]))
    assert result.exit_index.tolist() == [1, 1, 3, 3]
    assert result.exit_layer.tolist() == [3, 3, 6, 6]
    every = model.forward_exits(images(4))
    torch.testing.assert_close(result.logits[:2], every.exits[1][:2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.logits[2:], every.final[2:], atol=1e-4, rtol=1e-4)


CHANGES = {
    "backbone in place": lambda m: m.backbone.blocks[1].mlp.fc1.weight.mul_(1.5),
    "backbone bias": lambda m: m.backbone.blocks[3].attn.qkv.bias.add_(1.0),
    "head": lambda m: m.exit_heads[0].classifiers[0].weight.mul_(-1),
    "batchnorm": lambda m: m.exit_heads[0].perception.norm1.running_mean.add_(1.0),
    "replaced parameter": lambda m: setattr(
        m.backbone.head, "weight", nn.Parameter(-m.backbone.head.weight)
    ),
    "replaced module": lambda m: setattr(m.backbone.blocks[0].mlp, "act", nn.ReLU()),
    "loaded": lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}),
    "trained": lambda m: m.train().eval(),
    "double": lambda m: m.double(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_model_is_followed(mode, change):
    model = tiny_model(exits=[2, 3, 5])
    engine = Engine(model, max_batch=8, **mode)
    engine(images(4))
    change(model)
    given = images(4).to(next(model.parameters()).dtype)
    assert_same(engine(given), model.infer(given))


def test_train_mode_is_refused(mode):
    model = tiny_model(exits=[2])
    engine = Engine(model, **mode)
    model.train()
    with pytest.raises(RuntimeError, match="eval"):
        engine(images(2))


def test_threads_take_turns(model, mode):
    engine = Engine(model, max_batch=4, **mode)
    batches = [images(1 + seed % 6, seed=seed) for seed in range(12)]
    results = [None] * len(batches)

    def work(first):
        for i in range(first, len(batches), 3):
            results[i] = engine(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, result in zip(batches, results, strict=True):
        assert_same(result, model.infer(batch))


def test_an_error_leaves_the_engine_usable(model, mode):
    engine = Engine(model, max_batch=4, **mode)

    class Broken(lgvit_fast.Policy):
        def decide(self, step, state, exit_index):
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        engine(images(3), Broken())
    assert_same(engine(images(3)), model.infer(images(3)))


def test_nan_image_is_flagged_and_alone(model, mode):
    given = images(5)
    given[2] = float("nan")
    result = Engine(model, max_batch=8, **mode)(given, lgvit_fast.Confidence(0.0))
    assert result.nonfinite.tolist() == [False, False, True, False, False]
    assert result.exit_index.tolist() == [0, 0, 3, 0, 0]


def test_inference_mode_and_normal_mode_mix(model, mode):
    engine = Engine(model, max_batch=4, **mode)
    with torch.inference_mode():
        engine(images(3))
    assert_same(engine(images(3)), model.infer(images(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, mode, dtype):
    engine = Engine(model, max_batch=4, **mode)
    engine(images(3))
    with torch.autocast("cpu", dtype):
        result = engine(images(3), lgvit_fast.Replay([0, 1, 3]))
        expected = model.infer(images(3), lgvit_fast.Replay([0, 1, 3]))
    assert result.logits.dtype == dtype
    torch.testing.assert_close(result.logits, expected.logits, atol=0.1, rtol=0.1)


def test_bfloat16_model(mode):
    model = tiny_model(exits=[2, 3]).bfloat16()
    given, script = images(3).bfloat16(), lgvit_fast.Replay([0, 1, 2])
    got, want = Engine(model, **mode)(given, script), model.infer(given, script)
    torch.testing.assert_close(got.logits, want.logits, atol=0.1, rtol=0.1)


def test_other_image_sizes(mode):
    model = tiny_model(exits=[2, 3], dynamic_img_size=True)
    engine = Engine(model, max_batch=4, **mode)
    for size in ((32, 32), (48, 32), (16, 40)):
        assert_same(engine(images(3, size)), model.infer(images(3, size)))


def test_compiled_blocks(model):
    engine = Engine(model, max_batch=8, graphs=False, compile=True)
    for batch in (5, 8):
        assert_same(engine(images(batch)), model.infer(images(batch)))


def test_the_model_is_left_as_it_was(model):
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    Engine(model, graphs=False)(images(2))
    assert before == {name: (type(m), id(m)) for name, m in model.named_modules()}
    assert keys == list(model.state_dict())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_batch": 2.5}, "max_batch=2.5"),
        ({"graphs": "maybe"}, "graphs='maybe'"),
        ({"graphs": True}, "on cpu"),
        ({"exits": [4]}, r"out of \[2, 3, 5\]"),
        ({"exits": [5, 2]}, "increasing"),
        ({"buckets": [4, 2, 256]}, "increasing"),
        ({"buckets": [1, 2]}, "max_batch=256"),
    ],
    ids=lambda value: str(value),
)
def test_bad_arguments(model, options, match):
    with pytest.raises(ValueError, match=match):
        Engine(model, **options)


def test_bad_images(model, mode):
    with pytest.raises(ValueError, match="31 x 32"):
        Engine(model, **mode)(images(2, (31, 32)))


@pytest.mark.parametrize("error", [CaptureError, torch.OutOfMemoryError, RuntimeError])
def test_only_a_failed_capture_turns_graphs_off(model, monkeypatch, error):
    def capture(work, pool, side):
        raise error("cannot")

    engine = Engine(model, max_batch=4)
    monkeypatch.setattr(engine_module, "capture_graph", capture)
    monkeypatch.setattr(engine, "_graphs", True)  # as on a GPU
    if error is CaptureError:
        assert_same(engine(images(3)), model.infer(images(3)))
        assert engine._graphs is False
        assert engine.report().graphs_off == "cannot"
        return
    with pytest.raises(error, match="cannot"):
        engine(images(3))
    assert engine._graphs is True
