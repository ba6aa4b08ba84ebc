"""CUDA graphs for real; on the CPU the same buckets run without capture in test_engine.py."""

import pytest
import torch

import lgvit_fast
from lgvit_fast.inference import Engine, stream
from tests.helpers import images, tiny_model

pytestmark = pytest.mark.gpu

MODES = {
    "graphs": {"graphs": True},
    "speculative": {"graphs": True, "speculate": True},
    "compiled": {"graphs": True, "compile": True},
    "launches": {"graphs": False},
    "automatic": {},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(exits=[2, 3, 5], embed_dim=64).cuda()


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def engine(model, request):
    return Engine(model, max_batch=16, **request.param)


def assert_same(got, want):
    assert torch.equal(got.exit_index, want.exit_index)
    assert torch.equal(got.nonfinite, want.nonfinite)
    torch.testing.assert_close(got.logits, want.logits, atol=2e-3, rtol=2e-3, equal_nan=True)


@pytest.mark.parametrize("batch", [1, 7, 16, 40])
def test_answers_are_those_of_infer(model, engine, batch):
    for seed in range(3):
        given = images(batch, seed=seed).cuda()
        script = lgvit_fast.Replay([(i + seed) % 4 for i in range(batch)])
        assert_same(engine(given, script), model.infer(given, script))


def test_policies_decide_inside_the_graph(model, engine):
    given = images(16).cuda()
    for policy in (lgvit_fast.Patience(2), lgvit_fast.Confidence(0.0), lgvit_fast.Entropy(0.0)):
        assert torch.equal(engine(given, policy).exit_index, model.infer(given, policy).exit_index)


def test_answers_survive_the_next_call_and_other_streams(model, engine):
    batches = [images(9, seed=i).cuda() for i in range(6)]
    expected = [model.infer(b, lgvit_fast.Patience(2)) for b in batches]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for i, batch in enumerate(batches):
        with torch.cuda.stream(streams[i % 3]):
            results.append(engine(batch, lgvit_fast.Patience(2)))
    torch.cuda.synchronize()
    for got, want in zip(results, expected, strict=True):
        assert_same(got, want)


def test_a_change_of_the_model_is_followed():
    model = tiny_model(exits=[2, 3]).cuda()
    engine = Engine(model, max_batch=8, graphs=True)
    given = images(5).cuda()
    engine(given)
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc1.weight.mul_(1.5)
        model.exit_heads[0].classifiers[0].weight.neg_()
    assert_same(engine(given), model.infer(given))
    model.train().eval()  # drops the folded weights whose addresses the graphs hold
    assert_same(engine(given), model.infer(given))


def test_steady_state_allocates_no_device_memory(model):
    engine = Engine(model, max_batch=16, graphs=True)
    script = lgvit_fast.Replay([i % 4 for i in range(16)])
    given = images(16).cuda()
    engine.warm_up(given, script)
    engine(given, script)
    before = torch.cuda.memory_stats()
    for _ in range(20):
        engine(given, script)
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert after["allocated_bytes.all.current"] == before["allocated_bytes.all.current"]


def test_half_precision_autocast(model, engine):
    given, script = images(6).cuda(), lgvit_fast.Replay([0, 1, 3] * 2)
    with torch.autocast("cuda", torch.bfloat16):
        got, want = engine(given, script), model.infer(given, script)
    assert torch.equal(got.exit_index, want.exit_index)
    torch.testing.assert_close(got.logits, want.logits, atol=0.15, rtol=0.15)


def test_stream(model, engine):
    batches = [images(6, seed=i) for i in range(20)]  # on the CPU: the stream moves them
    running = stream(engine, batches, 8, policy=lgvit_fast.Patience(2))
    answers = list(running)
    report = running.report()
    assert bool(report.graphs) == bool(engine._graphs) and not report.graphs_off
    expected = model.infer(torch.cat(batches).cuda(), lgvit_fast.Patience(2))
    assert [a.exit_index for a in answers] == expected.exit_index.tolist()
    got = torch.stack([a.logits for a in answers])
    torch.testing.assert_close(got, expected.logits, atol=2e-3, rtol=2e-3)
