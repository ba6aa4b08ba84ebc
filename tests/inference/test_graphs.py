"""The graph engine's own work around its segments; on the CPU, where nothing is captured."""

import weakref
from bisect import bisect_left
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lgvit_fast
from benchmarks.host_time import host_time
from lgvit_fast import segments
from lgvit_fast.inference import Engine, graphs
from lgvit_fast.inference import engine as engine_module
from lgvit_fast.inference.graphs import (
    BucketRunner,
    CaptureError,
    Graphs,
    capture_graph,
    default_buckets,
)
from tests.helpers import images, tiny_model

VIEWS = {"narrow", "slice", "view", "split_with_sizes", "to", "lift_fresh", "detach"}
VIEWS |= {"select", "item", "resolve_conj", "resolve_neg"}  # as NumPy, as a number


def tiny_engine(model, **options):
    return Engine(model, max_batch=8, graphs="eager", **options)


def runner_of(engine):
    (runner,) = engine._runners.values()
    return runner


def assert_same(got, want):
    assert torch.equal(got.exit_index, want.exit_index)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [lgvit_fast.Confidence(0.5), lgvit_fast.Replay([0, 1, 3])],
    ids=["rule", "script"],
)
def test_a_batch_begins_with_two_copies_and_ends_with_one(policy):
    engine = tiny_engine(tiny_model(exits=[2, 3]), buckets=[8])
    engine.warm_up(images(3), policy)
    runner = runner_of(engine)
    for place, bucket in runner._graphs.steps:  # nothing leaves, nothing is computed
        runner._graphs.steps[place, bucket] = lambda place=place: runner.counts.numpy().put(
            place, 3
        )
    given = images(3)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as found:
        runner.run(given, policy, engine._tally)
    names = [event.name for event in found.events() if event.cpu_parent is None]
    writes = [name.removeprefix("aten::") for name in names]
    writes = [name for name in writes if name not in VIEWS]
    assert writes == ["copy_", "copy_", "clone"]


def test_weights_are_looked_at_once_and_after_the_first_launch(monkeypatch):
    engine = tiny_engine(tiny_model(exits=[2, 3]))
    nobody = lgvit_fast.Confidence(1.0)
    engine(images(8), nobody)
    runner, order = runner_of(engine), []
    steps = runner._graphs.steps
    for (place, bucket), step in list(steps.items()):
        steps[place, bucket] = lambda place=place, step=step: (
            order.append(place),
            step(),
        )
    look = engine._watch.changed
    monkeypatch.setattr(engine._watch, "changed", lambda share: order.append("look") or look(share))
    engine(images(8), nobody)
    assert order == [0, "look", 1, 2]


def test_a_count_that_nobody_waits_for_is_not_written_to_the_host(monkeypatch):
    engine = tiny_engine(tiny_model(exits=[2, 3]), buckets=[8])
    engine.warm_up(images(8))
    runner, told = runner_of(engine), []
    monkeypatch.setattr(runner, "_on_gpu", True)
    monkeypatch.setattr(
        graphs, "end_exit_", lambda *args, counts, **named: told.append(counts.told is not None)
    )
    with torch.no_grad():
        for place in range(3):
            runner._work(place, 8)()
    assert told == [True, True, False]


CHANGES = {
    "in place": lambda m: m.backbone.blocks[0].mlp.fc1.weight.mul_(1.5),
    "seen by its bytes alone": lambda m: m.exit_heads[1].classifiers[0].weight.data.neg_(),
    "replaced": lambda m: setattr(m.backbone.head, "weight", nn.Parameter(-m.backbone.head.weight)),
    "folded weights dropped": lambda m: m.train().eval(),
    "other classes": lambda m: m.reset_classifier(5),  # the launch itself fails
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_computed_of_other_weights_is_dropped(change):
    model = tiny_model(exits=[2, 3])
    engine = tiny_engine(model)
    given, policy = images(8), lgvit_fast.Replay([0, 1, 2] * 2 + [2, 2])
    engine(given, policy)
    stale, launched = runner_of(engine), []
    step = stale._graphs.steps[0, 8]
    stale._graphs.steps[0, 8] = lambda: (launched.append(True), step())
    change(model)
    engine.reset_report()
    share = engine_module._LOOK_IMAGES
    engine_module._LOOK_IMAGES = 8  # every byte is looked at
    try:
        assert_same(engine(given, policy), model.infer(given, policy))
    finally:
        engine_module._LOOK_IMAGES = share
    assert launched == [True] and not stale._graphs.steps
    assert [s.images for s in engine.report().segments] == [8, 6, 4]
    fresh = runner_of(engine)
    assert_same(engine(given, policy), model.infer(given, policy))
    assert runner_of(engine) is fresh


@torch.no_grad()
def test_two_engines_of_a_model_that_changed_settle(monkeypatch):
    model, made = tiny_model(exits=[2]), []
    pair = tiny_engine(model), tiny_engine(model)

    def counting(*args):
        made.append(BucketRunner(*args))
        return made[-1]

    monkeypatch.setattr(engine_module, "BucketRunner", counting)
    for engine in pair:
        engine(images(2))
    model.exit_heads[0].classifiers[0].weight.neg_()
    for turn in range(4):
        for engine in pair:
            assert_same(engine(images(2)), model.infer(images(2)))
        if turn == 1:
            settled = len(made)
    assert len(made) == settled


def test_what_a_graph_reads_stays_until_it_is_released():
    model = tiny_model(exits=[2])
    engine = tiny_engine(model, prepare=False)
    engine(images(2))
    runner = runner_of(engine)
    read = {parameter.data_ptr() for parameter in model.backbone.parameters()}
    model.backbone.to(torch.float64)  # the parameters' memory is another's now
    assert read <= {storage.data_ptr() for storage in runner._graphs._weights}
    gone = weakref.ref(runner._graphs)
    del runner
    engine.release()
    assert gone() is None


class Done:
    """An event after the last batch, which must be waited for before graphs go."""

    def __init__(self, runner):
        self.runner, self.held = runner, None

    def synchronize(self):
        self.held = len(self.runner._graphs.steps)


def test_eviction_and_release_wait_for_the_last_replay():
    engine = tiny_engine(tiny_model(exits=[2]))
    events = []
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
        engine(images(1), lgvit_fast.Confidence(threshold))
        runner = next(reversed(engine._runners.values()))
        runner._graphs._done = Done(runner)
        events.append(runner._graphs._done)
    assert [event.held is not None for event in events] == [True] + [False] * 4
    engine.release()
    assert all(event.held for event in events)


class Recorded:
    """Stands for a CUDA graph; a failure while it records makes its end fail too."""

    broken = None
    asked = None

    def capture_begin(self, **options):
        Recorded.asked = options

    def capture_end(self):
        if Recorded.broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        pass


REFUSED = "CUDA error: operation not permitted when stream is capturing"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError(REFUSED), CaptureError),
        (RuntimeError("the policy's own"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory while capturing"), torch.OutOfMemoryError),
        (KeyError("user"), KeyError),
        (None, None),
    ],
    ids=["refused by CUDA", "a user's error", "out of memory", "no RuntimeError", "none"],
)
def test_errors_of_a_capture(monkeypatch, error, raised):
    def work():
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(Recorded, "broken", error)
    if error is None:
        capture_graph(work, "pool", "side")()
    else:
        with pytest.raises(raised) as found:
            capture_graph(work, "pool", "side")
        assert type(found.value) is raised
        assert error in (found.value, found.value.__cause__)  # the first error is the one told
    assert Recorded.asked == {"pool": "pool", "capture_error_mode": "thread_local"}


def test_a_pool_without_graphs_is_not_used_again(monkeypatch):
    """CUDA's allocator refuses a pool whose graphs are gone, or whose first capture failed."""
    stream, pools = Mock(), []

    def capture(work, pool, side):
        pools.append(pool)
        if len(pools) == 1:
            raise KeyError("user")
        return work

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    recorded = Graphs(capture, torch.device("cpu"), nn.Identity())
    monkeypatch.setattr(recorded, "_side", stream)  # as on a GPU
    monkeypatch.setattr(recorded, "_free_bytes", lambda: 0)
    with pytest.raises(KeyError):
        recorded.record("a", Mock())
    recorded.record("a", Mock())
    recorded.record("b", Mock())
    recorded.clear()
    recorded.record("a", Mock())
    assert pools[1] is pools[2]
    assert len(set(map(id, pools))) == 3


@pytest.mark.parametrize("max_batch", [1, 2, 7, 8, 16, 60, 64, 256, 1000])
def test_default_buckets_waste_little(max_batch):
    sizes = default_buckets(max_batch)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 1 and sizes[-1] == max_batch and len(sizes) <= 24
    assert {8, 12, 16, 24, 32} & set(range(max_batch)) <= set(sizes)
    step = max(8, -(-max_batch // 128) * 8)
    for count in range(1, max_batch + 1):
        bucket = sizes[bisect_left(sizes, count)]
        assert bucket - count < step or (bucket - count) / bucket <= (
            0.375 if bucket <= 32 else 0.5
        )


def test_graphs_and_their_memory_are_reported():
    engine = tiny_engine(tiny_model(exits=[2, 3]), buckets=[2, 8])
    engine.warm_up(images(2))
    report = engine.report()
    tokens = 8 * 17 * 32 * 4  # one buffer for all segments
    assert report.graphs == 3 * 2
    assert images(8).nbytes + tokens < report.graph_bytes < 2 * (images(8).nbytes + tokens)
    assert "6 graphs" in str(report)


def test_infer_allocates_what_its_exits_wait_with_once(monkeypatch):
    model, found = tiny_model(exits=[2, 3]), []
    end_exit = segments.end_exit_
    monkeypatch.setattr(
        segments,
        "end_exit_",
        lambda *a, counts: found.append(counts) or end_exit(*a, counts=counts),
    )
    model.infer(images(3), lgvit_fast.Confidence(1.0))
    assert len(found) == 3 and found[0] is not None
    assert all(counts is found[0] for counts in found)


def test_host_time_is_told():
    found = host_time(lgvit_fast.Confidence(1.0), 1, 3)
    assert all(us > 0 for us in found)
