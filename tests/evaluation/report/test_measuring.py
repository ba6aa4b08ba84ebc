"""Processes that take turns: one that fails takes no other with it."""

import os
import signal
from importlib.util import find_spec

import pytest
import torch

import lgvit_fast
from lgvit_fast.clock import Spread
from lgvit_fast.data.batches import Batch
from lgvit_fast.evaluation.report import Row, Way, make
from lgvit_fast.evaluation.report.measuring import measure_all
from lgvit_fast.evaluation.report.worker import Task, Worker, _full_batches
from tests.helpers import images, tiny_model

COUNT = 21


class Images:
    """Noise, the same in every process."""

    class_names = ()

    def __len__(self):
        return COUNT

    def __getitems__(self, keys):
        places = [place for _, place in keys]
        return Batch(images(COUNT)[places], torch.tensor(places) % 7, [])


class Deadly(Images):
    """Ends the process that reads it."""

    def __getitems__(self, keys):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(exits=4).save_pretrained(folder)
    return str(folder)


def task(folder, way, source=None):
    return Task(way, folder, 7, "cpu", source or Images(), 8, tuple(range(5)))


def test_rows_and_what_is_left_out(folder):
    tasks = [
        task(folder, Way("eager")),
        task(folder, Way("eager", early=True)),
        task(folder, Way("eager", rival="gone")),
        task(folder, Way("eager", rival=folder), Deadly()),
    ]
    model = tiny_model(exits=4)
    with torch.no_grad():
        full = model.backbone(images(COUNT)).argmax(-1)
        early = model.infer(images(COUNT))
    lines = []
    rows, left_out = measure_all(
        tasks, torch.arange(COUNT) % 7, full,
        num_blocks=6, batch_sizes=(1, 8), rounds=2, progress=lines.append,
    )  # fmt: skip
    assert [row.way for row in rows] == [Way("eager"), Way("eager", early=True)]
    right = full == torch.arange(COUNT) % 7
    assert rows[0].correct == int(right.sum()) and rows[0].losses == rows[0].gains == 0
    assert rows[0].layer_ratio == 1
    assert rows[1].layer_ratio == pytest.approx(6 / early.exit_layer.double().mean().item())
    answered = early.prediction == torch.arange(COUNT) % 7
    assert rows[1].correct == int(answered.sum())
    assert rows[1].losses - rows[1].gains == rows[0].correct - rows[1].correct
    assert all(set(row.ms) == {1, 8} and row.ms[8].median > 0 for row in rows)
    reasons = {way.rival: reason for way, reason in left_out}
    assert set(reasons) == {"gone", folder}
    assert "timm has no 'gone'" in reasons["gone"]
    assert "ended with code -9" in reasons[folder]
    assert "batch 8: round 2 of 2" in lines


@pytest.mark.skipif(not find_spec("onnx") or not find_spec("onnxruntime"), reason="not installed")
def test_an_exported_model_answers_as_the_model(tmp_path):
    model = tiny_model(exits=2, depth=3)
    lgvit_fast.export(model, tmp_path / "early")
    way = Way("onnxruntime", early=True)
    classes, layers = Worker(task(str(tmp_path / "early"), way))(None)
    expected = model.infer(images(COUNT))
    assert classes.tolist() == expected.prediction.tolist()
    assert layers.tolist() == expected.exit_layer.tolist()


@pytest.mark.parametrize("engine", ["eager", "engine"])
@pytest.mark.parametrize("early", [False, True], ids=["full", "early"])
def test_engines_answer_as_the_model(folder, engine, early):
    classes, layers = Worker(task(folder, Way(engine, early=early)))(None)
    model = tiny_model(exits=4)
    with torch.no_grad():
        full, found = model.backbone(images(COUNT)).argmax(-1), model.infer(images(COUNT))
    assert classes.tolist() == (found.prediction if early else full).tolist()
    assert (layers.tolist() if early else layers) == (found.exit_layer.tolist() if early else None)


@pytest.mark.parametrize("shown", [20, None], ids=["some are left", "none are left"])
def test_int8_calibrated_on_the_reported_images_is_told(monkeypatch, shown):
    row = Row(Way("eager"), COUNT, 1, 0, 0, {1: Spread(1.0, 1.0, 1.0)})
    monkeypatch.setattr(make, "measure_all", lambda *a, **k: ([row], []))
    monkeypatch.setattr(make, "why_not", lambda *a: None)
    monkeypatch.setattr(make._Exports, "of", lambda *a: "")
    report = make.make_report(
        tiny_model(exits=4), lambda spec: Images(), name="tiny", images=shown, batch_sizes=(1,)
    )
    assert any("calibrated" in note for note in report.notes) == (shown is None)


def test_bad_numbers():
    for numbers in ({"rounds": 0, "batch_sizes": (1,)}, {"rounds": 1, "batch_sizes": (0,)}):
        with pytest.raises(ValueError, match="expected at least 1"):
            measure_all([], torch.zeros(0), torch.zeros(0), num_blocks=1, progress=print, **numbers)


def test_batches_are_always_full():
    batches = list(_full_batches(torch.arange(5), 2))
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3]]
    (batch,) = _full_batches(torch.arange(3), 4)
    assert batch.tolist() == [0, 1, 2, 0]
