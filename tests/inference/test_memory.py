"""In steady state an engine keeps nothing of a call: no buffer grows, no tensor is left behind."""

import gc
import weakref

import pytest
import torch

import lgvit_fast
from lgvit_fast.inference import Engine, stream
from tests.helpers import images, tiny_model


@pytest.fixture(autouse=True)
def _quiet_profiler(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def kept_bytes(work):
    """Bytes that `work` allocated and did not free, and how often it allocated at all."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(sizes), sum(size > 0 for size in sizes)


def test_the_measure_sees_what_is_kept():
    kept = []
    assert kept_bytes(lambda: kept.append(torch.zeros(1000)))[0] == 4000
    assert kept_bytes(lambda: torch.zeros(1000))[0] == 0


@pytest.mark.parametrize(
    "options",
    [{"graphs": False}, {"graphs": "eager"}, {"graphs": "eager", "speculate": True}],
    ids=["plain", "buckets", "speculative"],
)
def test_an_engine_keeps_nothing_of_a_call(options):
    engine = Engine(tiny_model(exits=[2, 3, 5]), max_batch=8, **options)
    batches = [(images(n, seed=n), lgvit_fast.Replay([i % 4 for i in range(n)])) for n in (8, 3, 5)]
    for given, policy in batches:
        engine(given, policy)
    counts = []
    for _ in range(2):
        for given, policy in batches:
            kept, allocations = kept_bytes(lambda g=given, p=policy: engine(g, p))
            assert kept == 0
            counts.append(allocations)
    assert counts[:3] == counts[3:], "the same call allocates more and more"


def test_a_stream_keeps_nothing_once_it_has_ended():
    engine = Engine(tiny_model(exits=[2, 3, 5]), graphs=False)
    batches, policy = images(24).split(8), lgvit_fast.Patience(2)
    list(stream(engine, batches, 4, policy=policy))
    kept, _ = kept_bytes(lambda: list(stream(engine, batches, 4, policy=policy)))
    assert kept == 0


def test_release_frees_buffers_and_packed_weights_at_once():
    model = tiny_model(exits=[2, 3, 5])
    engine = Engine(model, max_batch=8, graphs="eager")
    engine(images(8))
    buffers = weakref.ref(next(iter(engine._runners.values())).tokens[1])
    packed = weakref.ref(engine.segments[0].adapter.model.blocks[0].mlp.fc1)
    gc.disable()
    try:
        engine.release()
        assert buffers() is None
    finally:
        gc.enable()
    gc.collect()  # module trees refer to themselves
    assert packed() is None
