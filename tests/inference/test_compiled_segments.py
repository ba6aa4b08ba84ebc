"""Whole segments compiled at each captured batch size."""

from functools import partial

import pytest
import torch

import lgvit_fast
from lgvit_fast.inference import Engine
from lgvit_fast.inference.prepared import compiled_segment
from tests.helpers import images, tiny_model, tiny_swin

# Nine segments and sizes: more versions than torch compiles of one piece of code.
MODELS = {
    "vit": (lambda: tiny_model(exits=[1, 2], depth=3), [1, 2, 4]),
    "swin": (lambda: tiny_swin(exits=[3]), [4]),
    "heads without a form of their own": (
        lambda: tiny_model(exits=[1, 2], depth=3, heads=["conv", "vit_ee"]),
        [4],
    ),
}


@pytest.fixture
def compiled(monkeypatch):
    """How many operations each graph has that torch was asked to compile; none is compiled."""
    graphs = []

    def backend(graph, inputs):
        assert all(isinstance(value, torch.Tensor) for value in inputs)  # no size is left open
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return graphs


def assert_same(got, want):
    assert torch.equal(got.exit_index, want.exit_index)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("make", "buckets"), MODELS.values(), ids=MODELS)
def test_each_segment_is_one_graph_at_each_size(compiled, make, buckets):
    model = make()
    size = tuple(model.backbone.patch_embed.img_size)
    engine = Engine(model, max_batch=4, graphs="eager", compile=True, buckets=buckets)
    given, odd = images(4, size), lgvit_fast.Entropy(1.0)
    for policy in (lgvit_fast.Confidence(0.4), lgvit_fast.Replay([0, 1, 2, 9])):
        engine.warm_up(given, policy)
        assert_same(engine(given, policy), model.infer(given, policy))
        assert_same(engine(given[:3], odd), model.infer(given[:3], odd))
    assert len(compiled) == (len(model.exits) + 1) * len(buckets)  # whatever the rules are
    assert min(compiled) > 10  # blocks and head


@torch.no_grad()
def test_compiled_segments_follow_changed_weights(compiled):
    model = tiny_model(exits=[1], depth=2)
    engine = Engine(model, max_batch=2, graphs="eager", compile=True, buckets=[2])
    engine.warm_up(images(2))
    model.backbone.blocks[0].mlp.fc1.weight.mul_(1.5)
    assert_same(engine(images(2)), model.infer(images(2)))


def test_compiled_for_real():
    """By torch's own compiler; sums in another order, so float32 to 1e-4 of logits near 1."""
    model = tiny_model(exits=[1], depth=2)
    engine = Engine(model, max_batch=2, graphs="eager", compile=True, buckets=[2])
    script = lgvit_fast.Replay([0, 9])
    got, want = engine(images(2), script), model.infer(images(2), script)
    assert torch.equal(got.exit_index, want.exit_index)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)


def test_a_segment_runs_uncompiled_first(compiled):
    """What is measured on a first call cannot be while torch traces."""

    class Told:
        index, traced = 0, []

        def advance(self, tokens, image_size):
            self.traced.append(torch.compiler.is_compiling())
            return tokens + 1, None

    segment, tokens = Told(), torch.zeros(2)
    run = compiled_segment(segment, (8, 8))
    assert run(tokens)[0].sum().item() == 2 and compiled
    assert segment.traced == [False, True]
