"""Wall clock: what is compared and how it is told; never how long it took."""

import pytest
import torch

from lgvit_fast import Replay
from lgvit_fast.clock import Spread
from lgvit_fast.evaluation import timing as timing_module
from lgvit_fast.evaluation.timing import compare
from lgvit_fast.inference import Engine
from tests.helpers import images, tiny_model


def test_all_sides_see_all_images_in_alternating_rounds(monkeypatch):
    model, calls = tiny_model(exits=2), []
    dense = model.backbone.forward

    class Recorded(Engine):
        def __call__(self, x, policy=None):
            calls.append(("early" if self.exits else "full", len(x)))
            return super().__call__(x, policy)

    monkeypatch.setattr(
        model.backbone, "forward", lambda x: calls.append(("dense", len(x))) or dense(x)
    )
    monkeypatch.setattr(timing_module, "Engine", Recorded)
    timing = compare(model, images(5), batch_size=2, rounds=2, warmup=1)
    turns = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all([size for _, size in turn] == [2, 2, 1] for turn in turns)
    sides = [turn[0][0] for turn in turns]
    rounds = [sides[i : i + 3] for i in range(0, len(sides), 3)]
    assert len(rounds) == 3
    assert all(sorted(turn) == ["dense", "early", "full"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1, "the order changes"
    assert (timing.batch_size, timing.images, timing.rounds) == (2, 5, 2)
    assert (timing.exits, timing.full_runtime, timing.early_runtime) == ((2, 5), "torch", "torch")
    spreads = (timing.dense_ms, timing.full_ms, timing.early_ms, timing.ratio, timing.full_ratio)
    for spread in spreads:
        assert 0 < spread.low <= spread.median <= spread.high


def test_planned_exits_on_the_fastest_runtime(monkeypatch):
    made = []

    class Recorded(Engine):
        def __init__(self, model, max_batch, runtime, **options):
            made.append((runtime, options["exits"]))
            super().__init__(model, max_batch, "torch", **options)

    monkeypatch.setattr(timing_module, "Engine", Recorded)
    model = tiny_model(exits=[2, 4])
    timing = compare(model, images(3), rounds=1, warmup=0, runtime="auto", exits=(4,))
    assert made == [("auto", ()), ("auto", (4,))]
    assert timing.exits == (4,)


def test_the_layer_ratio_is_of_the_images_timed():
    model = tiny_model(exits=[2, 4])
    timing = compare(model, images(4), Replay([0, 0, 1, 2]), batch_size=4, rounds=1, warmup=0)
    assert timing.layer_ratio == pytest.approx(6 / ((2 + 2 + 4 + 6) / 4))


def test_spread_gives_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)


@pytest.mark.parametrize(
    ("count", "options"), [(0, {}), (2, {"rounds": 0}), (2, {"batch_size": 0})], ids=str
)
def test_nothing_to_time_is_refused(count, options):
    with pytest.raises(ValueError, match="expected at least 1 each"):
        compare(tiny_model(exits=2), torch.zeros(count, 3, 32, 32), **options)
