import json

import pytest

import lgvit_fast
from lgvit_fast.inference import Engine
from lgvit_fast.inference.gate import cached_gate, gate_file, measure_gate
from tests.helpers import images, tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def model():
    model = tiny_model(exits=[2, 3, 5])
    model.prepare()
    return model


@pytest.mark.parametrize(
    ("gate", "rows", "wasted"),
    [
        (1, [8, 7, 6, 3], [0, 0, 0, 0]),
        (2, [8, 7, 6, 3], [0, 1, 0, 0]),
        (5, [8, 7, 6, 3], [0, 1, 2, 0]),
        (8, [8, 7, 6, 3], [0, 1, 2, 5]),
    ],
)
def test_leavers_are_carried_until_enough_have_left(model, gate, rows, wasted):
    engine = Engine(model, graphs=False, gate=gate)
    script = lgvit_fast.Replay([3, 1, 2, 0, 3, 2, 3, 2])
    result = engine(images(8), script)
    assert result.exit_index.tolist() == script.exit_index.tolist()
    assert [s.images for s in engine.report().segments] == rows
    assert [s.wasted for s in engine.report().segments] == wasted


def test_a_measured_gate_is_kept_and_found_again(model):
    tokens = model.adapter.embed(images(4)).detach()
    before = tokens.clone()
    gate = measure_gate(tokens, model.segments, (4, 4))
    assert 1 <= gate <= 4
    assert tokens.equal(before)
    assert cached_gate(tokens, model.segments) == gate
    assert cached_gate(tokens[:, :5], model.segments) == 1, "of other tokens nothing is known"
    engine = Engine(model, graphs=False, prepare=False)
    assert engine.segments and engine._gate_of(tokens) == gate


def test_warm_up_measures(model):
    engine = Engine(model, graphs=False)
    engine.warm_up(images(4))
    assert gate_file().exists()
    assert engine.report().segments[0].runs == 0


@pytest.mark.parametrize("content", ["", "[]", '{"x": "y"}', "{"])
def test_a_damaged_file_means_compact_at_once(model, content):
    gate_file().parent.mkdir(parents=True)
    gate_file().write_text(content)
    tokens = model.adapter.embed(images(4)).detach()
    assert cached_gate(tokens, model.segments) == 1
    assert measure_gate(tokens, model.segments, (4, 4)) >= 1


def test_other_entries_are_kept(model):
    gate_file().parent.mkdir(parents=True)
    gate_file().write_text('{"another machine": 7}')
    measure_gate(model.adapter.embed(images(4)).detach(), model.segments, (4, 4))
    known = json.loads(gate_file().read_text())
    assert known["another machine"] == 7
    assert len(known) == 2


def test_a_folder_that_cannot_be_written_costs_only_the_memory(model, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert measure_gate(model.adapter.embed(images(4)).detach(), model.segments, (4, 4)) >= 1
