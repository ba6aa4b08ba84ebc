"""Continuous batching over exported graphs: the answers of the model, in an order that makes sense."""

import numpy as np
import pytest

from lgvit_fast.deploy import Deployed
from lgvit_fast.exit_rules import ExitRule, RuleKind
from lgvit_fast.policies import Confidence, Entropy, Patience, Policy
from lgvit_fast.runtimes.continuous import ContinuousBatcher
from lgvit_fast.runtimes.loaders import Graph, SegmentOutput
from lgvit_fast.runtimes.loop import GraphSegment
from tests.deploy import exports


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Stays(Policy):
    """An image leaves at the first exit where its first pixel is above 0."""

    def rule(self, exit_index):
        return ExitRule(RuleKind.CONFIDENCE, 0.5)


def fake(place, last, runs, fails=lambda x: False):
    """A graph whose images leave when their first value, which falls by 1 a graph, is below 1."""

    def run(x):
        runs.append((place, len(x)))
        if any(fails(row) for row in x):
            raise RuntimeError("out of order")
        value = x[:, 0, 0, 0]
        confidence = (value < 1).astype(np.float32)
        logits = np.stack([value, -value], axis=1)
        plain = np.zeros(len(x), np.float32), np.zeros(len(x), np.int64), np.ones(len(x), bool)
        return SegmentOutput(logits, confidence, *plain, None if last else x - 1)

    return GraphSegment(Graph(run, (1, 1, 1)), place, place + 1)


def batcher(count, batch_size, max_wait, clock=None, **options):
    runs = []
    segments = [fake(i, i == count - 1, runs, **options) for i in range(count)]
    made = ContinuousBatcher(segments, [Stays()], batch_size, max_wait, clock=clock or Clock())
    return made, runs


def image(value):
    return np.full((1, 1, 1), value, np.float32)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_of_the_model_under_each_image_s_own_policy(batch_size):
    deployed = Deployed(exports.folder(), threads=1)
    policies = [Entropy(0.9), Patience(2), Confidence(0.4)]
    size = deployed.manifest.preprocessing.size
    images = np.random.default_rng(0).normal(size=(17, 3, *size)).astype(np.float32)
    images[5, 0, 0, 0] = np.nan
    under = np.arange(17) % 3
    made = deployed.batcher(batch_size, 0.0, policies)
    found, waiting = {}, list(range(17))
    while waiting or len(made):
        for key in waiting[:2]:  # two come for each run
            made.add(images[key].copy(), key, int(under[key]))
        del waiting[:2]
        for finished in made.step():
            assert finished.key not in found
            found[finished.key] = finished
    assert sorted(found) == list(range(17))
    for number, policy in enumerate(policies):
        rows = np.flatnonzero(under == number)
        expected = deployed(images[rows], policy)
        for row, key in enumerate(rows):
            got = found[key]
            assert got.policy == number and got.error is None
            assert got.exit_index == expected.exit_index[row]
            assert got.exit_layer == expected.exit_layer[row]
            assert got.nonfinite == expected.nonfinite[row]
            np.testing.assert_allclose(got.logits, expected.logits[row], atol=1e-4)
    assert len({found[key].exit_layer for key in found}) > 1


def test_full_batches_run_deepest_first_and_survivors_wait_for_company():
    made, runs = batcher(3, batch_size=2, max_wait=1.0)
    for value in (2.0, 0.0, 2.0, 0.0):
        made.add(image(value), value)
    assert len(made.step()) == 1 and len(made.step()) == 1  # one of each pair stays
    assert made.waiting == (0, 2, 0)
    made.add(image(5.0), "new")
    made.add(image(5.0), "newer")
    made.step()
    assert runs == [(0, 2), (0, 2), (1, 2)]  # before the new ones


def test_an_image_waits_for_others_but_not_longer_than_it_may():
    clock = Clock()
    made, runs = batcher(3, batch_size=4, max_wait=1.0, clock=clock)
    assert made.wait() is None and made.step() == []
    made.add(image(9.0), "alone")
    assert made.wait() == 1.0 and made.step() == [] and not runs
    clock.now = 1.0
    assert made.wait() == 0.0
    made.step()
    assert made.wait() == 0.0  # nothing else to do: no reason to wait again
    made.step()
    (finished,) = made.step()
    assert runs == [(0, 1), (1, 1), (2, 1)] and finished.exit_layer == 3
    assert finished.queued == 1.0 and finished.computed == 0.0
    assert len(made) == 0


def test_new_images_do_not_starve_one_that_is_deep():
    clock = Clock()
    made, runs = batcher(3, batch_size=2, max_wait=1.0, clock=clock)
    made.add(image(9.0), "deep")
    made.add(image(0.0), "easy")
    made.step()
    for _ in range(4):  # full batches of new ones keep coming
        made.add(image(0.0), None)
        made.add(image(0.0), None)
        clock.now += 0.4
        made.step()
    assert (1, 1) in runs


def test_an_image_whose_graph_fails_takes_nobody_with_it():
    made, _ = batcher(2, batch_size=4, max_wait=0.0, fails=lambda row: row[0, 0, 0] == 7)
    for value in (0.0, 7.0, 5.0, 0.0):
        made.add(image(value), value)
    done = [*made.step(), *made.step()]
    assert {finished.key: finished.exit_layer for finished in done if finished.error is None} == {
        0.0: 1,
        5.0: 2,
    }
    (failed,) = [finished for finished in done if finished.error is not None]
    assert failed.key == 7.0 and "out of order" in str(failed.error)
    assert len(done) == 4 and len(made) == 0


def test_dropped_images_are_run_no_more():
    made, runs = batcher(2, batch_size=4, max_wait=0.0)
    made.add(image(9.0), "kept")
    made.add(image(9.0), "dropped")
    made.step()
    assert made.drop({"dropped", "unknown"}) == 1
    (finished,) = made.step()
    assert finished.key == "kept" and runs == [(0, 2), (1, 1)]


@pytest.mark.parametrize(
    ("batch_size", "max_wait", "message"),
    [(0, 0.0, "batch_size=0"), (True, 0.0, "batch_size=True"), (4, -1.0, "max_wait=-1")],
)
def test_numbers_out_of_range(batch_size, max_wait, message):
    with pytest.raises(ValueError, match=message):
        batcher(2, batch_size, max_wait)
