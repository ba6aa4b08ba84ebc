"""Where exits sit and what they are: the published rows, the general rule, and bad layouts."""

import pytest

from lgvit_fast.heads.layout import ExitSpec, default_heads, default_layers, resolve_exits

PUBLISHED = {
    8: "lph_full lph_full lph_light lph_light gah_2 gah_2 gah_3 gah_3",
    6: "lph_full lph_light gah_2 gah_2 gah_3 gah_3",
    4: "lph_full lph_light gah_2 gah_3",
    2: "lph_full gah_2",
}


@pytest.mark.parametrize(("count", "row"), PUBLISHED.items())
def test_published_rows(count, row):
    assert default_heads(default_layers(12, count), 12) == tuple(row.split())


def test_published_positions():
    assert default_layers(12) == (4, 5, 6, 7, 8, 9, 10, 11)


@pytest.mark.parametrize("depth", [2, 3, 5, 6, 12, 24, 40])
def test_any_depth_and_count(depth):
    for count in range(1, depth):
        specs = resolve_exits(count, None, depth)
        layers = [spec.layer for spec in specs]
        assert len(layers) == count
        assert layers == sorted(set(layers))
        assert layers[0] >= 1
        assert layers[-1] < depth
        kinds = [spec.kind for spec in specs]
        assert kinds == sorted(kinds, reverse=True)  # local ones before global ones


@pytest.mark.parametrize(
    ("layer", "kind"), [(3, "local"), (6, "local"), (7, "global"), (11, "global")]
)
def test_single_exit_follows_its_depth(layer, kind):
    (spec,) = resolve_exits([layer], None, 12)
    assert spec.kind == kind


def test_explicit_layouts():
    specs = resolve_exits([2, 5], ["gah_4", "lph_light"], 12)
    assert specs == (ExitSpec(2, "gah_4"), ExitSpec(5, "lph_light"))
    assert specs[0].stride == 4
    assert resolve_exits(specs, None, 12) == specs


@pytest.mark.parametrize(
    ("exits", "heads", "message"),
    [
        pytest.param([4, 12], None, "12 blocks", id="last-block"),
        pytest.param([4, 13], None, "12 blocks", id="beyond"),
        pytest.param([0, 4], None, "layer=0", id="zero"),
        pytest.param([5, 4], None, "increasing", id="unsorted"),
        pytest.param([4, 4], None, "increasing", id="repeated"),
        pytest.param([], None, "at least one", id="empty"),
        pytest.param(12, None, "exits=12", id="too-many"),
        pytest.param(0, None, "exits=0", id="none"),
        pytest.param([4.0, 5.0], None, "block numbers", id="floats"),
        pytest.param([4, 5], ["lph_full"], "1 entries for 2 exits", id="short-heads"),
        pytest.param([4], ["lph"], "head='lph'", id="unknown-head"),
        pytest.param([4], ["gah_0"], "head='gah_0'", id="stride-0"),
        pytest.param([ExitSpec(4, "gah_2")], ["gah_2"], "must be None", id="both"),
    ],
)
def test_bad_layouts(exits, heads, message):
    with pytest.raises(ValueError, match=message):
        resolve_exits(exits, heads, 12)
