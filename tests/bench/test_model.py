import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lgvit_fast
from lgvit_fast.arguments import UsageError
from lgvit_fast.bench import model as bench
from lgvit_fast.bench import passes
from lgvit_fast.bench.passes import Measured
from lgvit_fast.bench.published_scheme import PublishedScheme
from lgvit_fast.bench.traces import Trace
from lgvit_fast.bench.ways import LeftOut, Way
from tests.helpers import images, tiny_model


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_published_scheme_gives_our_answers(name):
    model = tiny_model(name, exits=4)
    script = lgvit_fast.Replay([0, 1, 2, 3, 4])
    expected = model.infer(images(5), script)
    got = PublishedScheme(model)(images(5), script)
    torch.testing.assert_close(got, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        lgvit_fast.Confidence(0.5),
        lgvit_fast.Confidence([0.6, 0.7, 0.6, 0.2]),
        lgvit_fast.Entropy(1.3),
        lgvit_fast.Patience(2),
        lgvit_fast.PatientConfident(1.1, 2),
    ],
    ids=str,
)
def test_the_published_scheme_decides_by_itself(policy):
    model = tiny_model(exits=4)
    expected = model.infer(images(6), policy)
    got = PublishedScheme(model)(images(6), policy)
    torch.testing.assert_close(got, expected.logits, atol=1e-4, rtol=1e-4)
    assert len(expected.exit_index.unique()) > 1


TRACE = Trace("mine", (2, 4, 6), (5, 3, 2), accuracy=80.0, dense_accuracy=81.0)
CHOSEN = [
    Way("dense timm", "dense timm"),
    Way("dense, faster", "dense, faster"),
    Way("engine", "dense timm"),
    Way("stream", "dense, faster", in_batches=False),
    Way("dense, int8", "dense, int8", "int8", "onnxruntime"),
    Way("deployed, int8", "dense, int8", "int8", "onnxruntime"),
]
SECONDS = {
    "dense timm": [4.0, 8.0, 4.0],
    "dense, faster": [2.0, 2.0, 3.0],
    "engine": [2.0, 2.0, 2.0],
    "stream": [1.0, 1.0, 1.0],
    "dense, int8": [1.0, 1.0, 1.0],
    "deployed, int8": [0.5, 0.5, 0.5],
}


def rows(*without):
    """What would be made of these seconds of passes in two calls, ten images."""
    script = TRACE.exits(10)
    measured = {
        name: Measured([[second / 4, 3 * second / 4] for second in taken], 7.0)
        for name, taken in SECONDS.items()
        if name not in without
    }
    return {row.way: row for row in bench.rows_of(CHOSEN, measured, TRACE, script, 5)}


def test_rows():
    found = rows()
    ratio = 6 / (0.5 * 2 + 0.3 * 4 + 0.2 * 6)
    engine = found["engine"]
    assert engine.ms_per_image == pytest.approx(200) and engine.images_per_second == 5
    assert engine.speedup == 2 and engine.spread == (2, 4)  # the median of the rounds' ratios
    assert engine.best_dense == "dense, faster" and engine.over_best_dense == 1
    assert engine.layer_ratio == pytest.approx(ratio)
    assert engine.realised_share == pytest.approx(2 / ratio)
    assert engine.kept_share == pytest.approx(1 / ratio)
    assert engine.accuracy == 80 and found["dense timm"].accuracy == 81
    assert engine.p50_ms == 1000 and engine.working_mib == 7
    assert found["stream"].p50_ms is None
    assert found["dense timm"].layer_ratio == found["dense timm"].realised_share == 1
    deployed = found["deployed, int8"]
    assert deployed.best_dense == "dense, int8" and deployed.over_best_dense == 2
    assert deployed.speedup == 8 and deployed.accuracy is None  # not that of the trace


def test_what_was_not_measured_leaves_blanks(tmp_path):
    found = rows("dense timm", "dense, int8")
    assert found["engine"].speedup is None and found["engine"].spread is None
    assert found["engine"].realised_share is None
    assert found["engine"].kept_share is not None
    assert found["deployed, int8"].best_dense is None
    failed = [(5, LeftOut("dense timm", "its process ended | code -9"))]
    lines = bench.markdown(list(found.values()), failed).splitlines()
    assert len(lines) == 2 + len(found) + 1
    assert len({line.count("|") for line in lines}) == 1
    assert "| 5 | dense timm | failed: its process ended / code -9 |" in lines[-1]
    shown = [*rows().values(), *(replace(row, batch_size=8) for row in rows().values())]
    bench.plot(shown, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def given(tmp_path):
    """A saved model, and options that measure it quickly."""
    tiny_model(exits=[2, 4]).save_pretrained(tmp_path / "model")
    trace = tmp_path / "trace.json"
    saved = {"name": "mine", "layers": [2, 4, 6], "images": [5, 3, 2], "accuracy": 80}
    trace.write_text(json.dumps(saved))
    return (
        f"--model {tmp_path / 'model'} --trace {trace} --batch-size 2 --images 4 --rounds 1"
        f" --no-compile --json {tmp_path / 'rows.json'}"
    ).split()


@pytest.fixture
def one_process(monkeypatch):
    """Ways answer in the process of the tests: the others take seconds to begin."""

    class Here:
        def __init__(self, make, *arguments, timeout):
            self.ask = make(*arguments)

        def close(self):
            pass

    monkeypatch.setattr(passes, "Isolated", Here)


def command(*options):
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    return bench.run(parser.parse_args(options))


def test_the_command(given, capsys, one_process):
    assert command(*given, "--only", "infer", "deployed, ONNX Runtime") == 0
    shown = capsys.readouterr().out
    assert "trace mine: 1.76x fewer layers, 80.0 % right" in shown
    written = json.loads(Path(given[-1]).read_text())
    facts = written["machine"]
    assert f"({' '.join(facts['instructions'])}), {facts['threads']} threads" in shown
    assert [row["way"] for row in written["rows"]] == [
        "dense timm", "infer", "dense, ONNX Runtime", "deployed, ONNX Runtime",
    ]  # fmt: skip
    assert all(row["ms_per_image"] > 0 for row in written["rows"])
    assert [row["accuracy"] for row in written["rows"]] == [None, 80, None, 80]
    assert written["failed"] == written["left_out"] == []
    assert facts["torch"] == torch.__version__


def test_ways_have_processes(given):
    assert command(*given, "--only", "dense timm") == 0
    (row,) = json.loads(Path(given[-1]).read_text())["rows"]
    assert row["ms_per_image"] > 0 and row["speedup"] == 1


def test_a_plan_is_checked(given, capsys, one_process):
    assert command(*given, "--plan", "--only", "infer") == 0
    assert "planned exits [" in capsys.readouterr().out
    written = json.loads(Path(given[-1]).read_text())
    plan = written["plans"][0]
    assert set(plan["exits"]) <= {2, 4}
    assert plan["measured_ms"] > 0
    assert "engine, planned exits" in [row["way"] for row in written["rows"]]


def test_what_cannot_be_exported_is_a_line(given, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(bench, "export_dense", broken)
    monkeypatch.setattr(bench, "measure", lambda ways, *a, **k: ({}, []))
    assert command(*given, "--only", "dense, OpenVINO") == 0
    assert "| dense, OpenVINO | failed: RuntimeError: no such operator |" in capsys.readouterr().out


def test_unknown_ways_are_refused(given, monkeypatch):
    missing = [LeftOut("OpenVINO", "not installed: pip install openvino")]
    monkeypatch.setattr(bench, "ways", lambda *a, **k: (CHOSEN, missing))
    expected = "'nothing': expected ways out of dense timm; .*OpenVINO: not installed: pip install"
    with pytest.raises(UsageError, match=expected):
        command(*given, "--only", "nothing")


def test_a_trace_of_another_depth_is_refused(tmp_path):
    trace = tmp_path / "trace.json"
    trace.write_text('{"layers": [2, 4, 6], "images": [5, 3, 2]}')
    with pytest.raises(ValueError, match="has 12"):
        command("--trace", str(trace), "--model", "vit_tiny_patch16_224")
