"""What an exit costs beside its head: counted, not timed."""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lgvit_fast
from lgvit_fast import _extension
from lgvit_fast.inference import slots
from tests.helpers import tiny_model

MOST = 4  # operations an exit beside the head's
MOST_IN_A_STREAM = 14  # views among them, and what takes the images in and out of their slots


def operations(call):
    """The operations that a call starts, without those that these are made of."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return [event.name for event in found.events() if event.cpu_parent is None]


@pytest.mark.skipif(
    _extension.why_compact_missing() is not None, reason="the extension is not built"
)
def test_an_exit_in_buckets_adds_few_operations():
    model = tiny_model().eval()
    images = torch.randn(8, 3, *model.backbone.patch_embed.img_size)
    policy = lgvit_fast.Replay(torch.full((8,), len(model.exits)))  # all meet every exit
    engine = lgvit_fast.Engine(model, max_batch=8, graphs="eager", buckets=[8])
    engine(images, policy)
    (runner,) = engine._runners.values()

    for segment, step in zip(engine.segments, runner._graphs.steps.values(), strict=True):
        tokens = runner.tokens[segment.index]
        state = runner.ledger.state

        def head(segment=segment, tokens=tokens, state=state):
            with torch.no_grad():
                segment(tokens, state, runner._image_size, policy)

        with torch.no_grad():
            everything = operations(step)
        extra = len(everything) - len(operations(head))
        assert 1 <= extra <= MOST, everything


def test_smaller_batches_can_be_captured_after_larger_ones():
    model = tiny_model().eval()
    engine = lgvit_fast.Engine(model, max_batch=4, graphs="eager", buckets=[1, 2, 4])
    images = torch.randn(4, 3, *model.backbone.patch_embed.img_size)
    everywhere = lgvit_fast.Replay(torch.arange(4) % (len(model.exits) + 1))
    first = engine(images, everywhere)
    engine.warm_up(images[:1], everywhere)
    again = engine(images, everywhere)
    assert all(map(torch.equal, first.tensors(), again.tensors()))


@pytest.mark.skipif(
    _extension.why_compact_missing() is not None, reason="the extension is not built"
)
def test_an_exit_in_a_stream_adds_few_operations(monkeypatch):
    model = tiny_model().eval()
    images = torch.randn(8, 3, *model.backbone.patch_embed.img_size)
    policy = lgvit_fast.Replay(torch.arange(8) % (len(model.exits) + 1))
    engine = lgvit_fast.Engine(model, max_batch=8, runtime="torch")
    engine(images, policy)
    looks, look = [], engine._watch.changed
    monkeypatch.setattr(engine._watch, "changed", lambda share: looks.append(share) or look(share))
    running = lgvit_fast.stream(engine, [images], 8, policy=policy)
    while not running._state.queues[1]:  # the first run makes the buffers
        running._advance()
    assert looks == [8 / 32]  # as thorough as of an engine's batch

    segments = engine.segments
    monkeypatch.setattr(engine, "segments_for", lambda count: segments)  # without another look
    for place, segment in list(enumerate(segments))[1:]:
        waiting = running._state.queues[place]
        with torch.no_grad():
            source = running._slots._waiting(place)
            inputs = slots._gather(place, source, torch.arange(len(waiting)))
            head = operations(partial(segment, *inputs, tuple(images.shape[2:]), policy))
            everything = operations(partial(running._launch, place))
        assert 1 <= len(everything) - len(head) <= MOST_IN_A_STREAM, everything
        waits = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
        assert not waits.intersection(everything)
    assert sorted(answer.exit_index for answer in running) == sorted(policy.exit_index.tolist())
