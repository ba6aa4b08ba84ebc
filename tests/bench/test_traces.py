from pathlib import Path

import pytest

from lgvit_fast.bench.traces import REAL_TRACE, Trace

SHIPPED = Path(__file__).parents[2] / "benchmarks/traces/cifar100_vit_base_confidence_0.8.json"


def test_the_shipped_trace_is_the_default_one():
    assert Trace.load(SHIPPED) == REAL_TRACE
    assert sum(REAL_TRACE.images) == 10_000
    assert REAL_TRACE.layer_ratio == pytest.approx(12 / 5.77, abs=0.005)


@pytest.mark.parametrize("count", [1, 7, 16, 64, 1000])
def test_few_images_follow_the_shares(count):
    exits = REAL_TRACE.exits(count)
    assert len(exits) == count
    for i, images in enumerate(REAL_TRACE.images):
        assert abs(exits.count(i) - count * images / 10_000) < 1


def test_order_is_shuffled_and_repeatable():
    exits = REAL_TRACE.exits(64)
    assert exits == REAL_TRACE.exits(64)
    assert exits != sorted(exits)
    assert exits != REAL_TRACE.exits(64, seed=1)
    assert sorted(exits) == sorted(REAL_TRACE.exits(64, seed=1))


def test_a_model_with_other_exits_is_refused():
    with pytest.raises(ValueError, match=r"after \[4, 5\]"):
        REAL_TRACE.policy(4, [4, 5])


@pytest.mark.parametrize(
    ("layers", "images"),
    [((2, 1), (1, 1)), ((1, 2), (1,)), ((1, 2), (0, 0)), ((1, 2), (3, -1)), ((), ())],
    ids=["unsorted", "lengths", "no images", "negative", "empty"],
)
def test_bad_traces(layers, images):
    with pytest.raises(ValueError, match="a trace needs"):
        Trace("bad", layers, images)


@pytest.mark.parametrize("content", ["[]", "{}", '{"layers": 3, "images": [1]}'])
def test_bad_files(tmp_path, content):
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no trace"):
        Trace.load(path)
