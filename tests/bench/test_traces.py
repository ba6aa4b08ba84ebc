import pytest

from lgvit_fast.bench.traces import REAL_TRACE, TRACES, Trace


@pytest.mark.parametrize(("threshold", "mean"), [("0.8", 5.774), ("0.9", 6.455), ("0.99", 8.103)])
def test_recorded_traces_are_whole(threshold, mean):
    trace = TRACES[threshold]
    assert sum(trace.images) == 10_000
    assert trace.layer_ratio == pytest.approx(12 / mean, abs=0.001)
    assert trace.accuracy < trace.dense_accuracy == 90.8


def test_a_trace_says_how_accurate_it_was(tmp_path):
    assert str(REAL_TRACE).endswith(
        "confidence 0.9: 1.86x fewer layers, 89.4 % right, dense 90.8 %"
    )
    path = tmp_path / "trace.json"
    path.write_text('{"name": "mine", "layers": [1, 2], "images": [3, 1]}')
    assert str(Trace.load(path)) == "mine: 1.60x fewer layers, accuracy not known"
    path.write_text('{"layers": [1, 2], "images": [3, 1], "accuracy": 70, "dense_accuracy": 71}')
    assert str(Trace.load(path)).endswith("70.0 % right, dense 71.0 %")


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
