"""What the load test computes; its servers run in tests/serve."""

import numpy as np
import pytest

from benchmarks.load_test.__main__ import Row, at_equal_p99, table
from benchmarks.load_test.servers import BatchAtATime, TraceInOrder
from lgvit_fast.deploy import Deployed
from tests.deploy import exports


def row(way, load, goodput, p99_ms):
    return Row(way, load, 10.0, 100, 90, 10, 0, goodput, p99_ms / 2, p99_ms)


def test_goodput_at_equal_p99_lies_between_the_loads_around_it():
    rows = [row("a", 0.5, 10.0, 100.0), row("a", 1.0, 20.0, 400.0), row("b", 0.5, 5.0, 300.0)]
    assert at_equal_p99(rows, "a", 100.0) == 10.0
    assert at_equal_p99(rows, "a", 200.0) == pytest.approx(15.0)
    assert at_equal_p99(rows, "a", 900.0) == 20.0
    assert at_equal_p99(rows, "b", 200.0) == 0.0
    assert len(table(rows).splitlines()) == 5


def test_a_batch_at_a_time_ends_together_with_the_trace_s_exits():
    deployed = Deployed(exports.folder(), threads=1)
    exits = [0, 4, 2, 1]
    policy = TraceInOrder(exits)
    batcher = BatchAtATime(deployed._segments, [policy], 4, 0.0)
    size = deployed.manifest.preprocessing.size
    for key in range(4):
        batcher.add(np.zeros((3, *size), np.float32), key)
    done = batcher.step()
    assert {one.key: one.exit_index for one in done} == dict(enumerate(exits))
    assert len(batcher) == 0
