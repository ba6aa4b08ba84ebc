"""Turns go round block by block; a way that fails is told and leaves the others alone."""

import pytest
import torch

from lgvit_fast.bench import passes
from lgvit_fast.bench.passes import Worker, measure
from lgvit_fast.bench.ways import Subject, Way
from lgvit_fast.isolated import Failure
from tests.helpers import tiny_model

WAYS = [Way(name, "a") for name in "abc"]


@pytest.fixture
def processes(monkeypatch):
    """Stand-ins for processes that note who was asked for how many calls; what each has left."""

    class Process:
        asked, dies_after, closed = [], {}, []

        def __init__(self, make, way, subject, shape, script, size, threads, *, timeout):
            self.name, self.calls = way.name, -(-len(script) // size)
            if self.dies_after.get(self.name) == 0:
                raise Failure("cannot begin")

        def ask(self, request):
            self.asked.append((self.name, request))
            if [name for name, _ in self.asked].count(self.name) == self.dies_after.get(self.name):
                raise Failure("died")
            if request == "begin":
                self.left = self.calls
                return self.calls
            if request == "peak":
                return 1.5
            taken, self.left = min(request, self.left), self.left - min(request, self.left)
            return [0.5] * taken

        def close(self):
            self.closed.append(self.name)

    monkeypatch.setattr(passes, "Isolated", Process)
    return Process


def run(images=40, size=1, rounds=2):
    return measure(WAYS, Subject(""), (3, 8, 8), [0] * images, size, rounds, 60)


def test_turns_go_round_block_by_block(processes):
    measured, failed = run()
    assert not failed and sorted(processes.closed) == ["a", "b", "c"]
    assert all([len(p) for p in found.passes] == [40, 40] for found in measured.values())
    assert measured["a"].working_mib == 1.5
    warm_up = [(name, request) for name in "abc" for request in ("begin", 40, "peak")]
    begins = [(name, "begin") for name in "abc"]
    blocks = [(name, 16) for name in "abcbcacab"]  # not always after the same way
    assert processes.asked == warm_up + 2 * (begins + blocks)


def test_a_block_is_at_least_one_batch(processes):
    measured, _ = run(images=64, size=32, rounds=1)
    assert [len(p) for p in measured["b"].passes] == [2]
    assert processes.asked[-6:] == [(name, 1) for name in "abcbca"]


@pytest.mark.parametrize("last", range(9), ids="its {}. request".format)
def test_a_way_that_fails_leaves_the_others_alone(processes, last):
    processes.dies_after = {"b": last}
    measured, failed = run()
    assert failed == [("b", "died" if last else "cannot begin")]
    assert list(measured) == ["a", "c"]
    assert all([len(p) for p in found.passes] == [40, 40] for found in measured.values())
    assert sorted(processes.closed) == (["a", "b", "c"] if last else ["a", "c"])


def test_the_process_of_a_way(tmp_path):
    tiny_model(exits=[2, 3]).save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    way = Way("infer", "dense timm")
    worker = Worker(way, Subject(str(tmp_path)), (3, 32, 32), [0, 1, 2, 0, 0], 2, threads)
    assert worker("begin") == 3
    assert worker("peak") > 0
    assert [len(worker(n)) for n in (2, 2, 2)] == [2, 1, 0]
    assert worker("begin") == 3 and all(second > 0 for second in worker(3))
