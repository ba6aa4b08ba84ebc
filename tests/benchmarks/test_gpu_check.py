"""The GPU check, rehearsed end to end on the CPU, and its record of rows."""

import itertools
import json
import os
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import memcheck, operators, whole_model
from benchmarks.gpu_check.devices import Gpu, StandIn
from benchmarks.gpu_check.record import Known, Measured, Record, Row, Skipped, ratio
from lgvit_fast.bench.traces import TRACES

ROOT = Path(__file__).parents[2]

# A process with no other packages than a GPU machine has: PyTorch, Triton, timm, what the tests and
# the package need, and what these depend on themselves.
BARE = """
import importlib.machinery, importlib.metadata as metadata, importlib.util, re, sys

ROOTS = '''torch triton timm torchvision pytest pytest-benchmark pytest-timeout pytest-xdist hypothesis
safetensors tqdm matplotlib scikit-learn tensorboard ninja setuptools pybind11 pip'''

def name_of(requirement):
    return re.match("[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")

there, left = set(), ROOTS.split()
while left:
    name = left.pop()
    if name not in there:
        there.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        left += [name_of(need) for need in needs if "extra ==" not in need]
REFUSED = {
    module for module, owners in metadata.packages_distributions().items()
    if not any(name_of(owner) in there for owner in owners)
} - set(sys.stdlib_module_names) - {"lgvit_fast", "benchmarks", "kernels", "tests"}
assert not there & {"onnx", "onnxruntime", "onnxscript", "openvino", "mypy"}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = name.partition(".")[0] not in REFUSED
        return super().find_spec(name, path, target) if known else None

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
assert importlib.util.find_spec("onnx") is None

# The rehearsal, then what pytest finds for the GPU.
from benchmarks.gpu_check.__main__ import main
assert main(["--rehearse", "--out", sys.argv[1]]) == 0
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A rehearsal's json and the GPU's tests, without the packages that a GPU machine lacks."""
    path = tmp_path_factory.mktemp("rehearsal") / "gpu.json"
    plugins = ("-p", "pytest_benchmark.plugin", "-p", "pytest_timeout")
    folders = ("tests/kernels", "tests/ops", "tests/inference")
    environment = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE, path, "-q", "--collect-only", "-m", "gpu", *plugins, *folders],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed, _, tests = done.stdout.partition(f"wrote {path}")
    return json.loads(path.read_text()), printed, tests


@pytest.fixture
def rehearsal(bare):
    return bare[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: no rehearsal")
class TestRehearsal:
    def test_every_row_is_filled_and_none_passes_for_a_measurement(self, rehearsal):
        assert rehearsal["rehearsal"] is True and rehearsal["finished"] is True
        assert rehearsal["machine"]["gpus"] == []
        assert [row["name"] for row in rehearsal["rows"]] == [
            row.name for row in command.rows(StandIn())
        ]
        for row in rehearsal["rows"]:
            assert row["rehearsal"] is True
            assert row["status"] in ("pass", "miss", "measured"), row
            assert row["measured"] >= 0
            assert (row["target"] is None) == (row["status"] == "measured")

    def test_rows_carry_floor_target_and_accuracy(self, rehearsal):
        rows = {row["name"]: row for row in rehearsal["rows"]}
        fused = rows["heads/bf16/batch 3/lph_full/ours"]
        assert fused["target"] == pytest.approx(2.5 * fused["floor"])
        assert fused["error"] <= 1e-2 and fused["target_is"] == "at most"
        for kind, batch in itertools.product(("full", "light"), (3, 1, 2)):
            for way in ("triton", "GEMM and tail"):
                assert rows[f"heads/bf16/batch {batch}/lph_{kind}/pool, {way}"]["error"] <= 1e-2
        assert rows["heads/bf16/batch 3/gah_2/ours"]["target"] == pytest.approx(
            3 * rows["heads/bf16/batch 3/gah_2/ours"]["floor"]
        )
        ours = rows["model/batch 3/engine, trace 0.9"]
        assert ours["graphs"] >= 1
        assert ours["accuracy"] == 89.41 and ours["dense_accuracy"] == 90.8
        gained = rows["model/batch 3/engine, trace 0.8 over best dense"]
        assert gained["target"] == pytest.approx(1.9) and gained["target_is"] == "at least"
        assert rows["model/batch 1/engine, trace 0.8 over best dense"]["target"] == 1.7

    def test_a_rehearsal_has_no_place_among_results(self, capsys):
        with pytest.raises(SystemExit):
            command.main(["--rehearse", "--out", str(command.RESULTS / "gpu.json")])
        assert "measures nothing" in capsys.readouterr().err
        assert not (command.RESULTS / "gpu.json").exists()

    def test_says_so_without_a_gpu(self, capsys):
        assert command.main([]) == 1
        assert "no CUDA device" in capsys.readouterr().err

    def test_calls_of_the_memory_check(self, capsys):
        assert memcheck.main(["--calls", "--device", "cpu"]) == 0
        calls = capsys.readouterr().out.splitlines()
        kinds = {call.partition(",")[0] for call in calls}
        others = {"compact_", "end_exit_", "lph_tail", "attention", "depthwise_gelu"}
        assert kinds == {*operators.HEADS, *others}

    def test_rows_are_printed_as_they_come(self, rehearsal, bare):
        assert len(bare[1].splitlines()) == len(rehearsal["rows"])

    def test_tests_for_the_gpu_are_collected(self, bare):
        assert "tests/inference/test_engine_gpu.py" in bare[2]
        assert "tests/ops/test_end_exit.py" in bare[2]


def test_order():
    names = [row.name for row in command.rows(Gpu())]
    assert len(set(names)) == len(names)
    parts = [key for key, _ in groupby(names, lambda name: "/".join(name.split("/")[:2]))]
    assert parts == [
        "rates/copy",
        "rates/gemm bf16",
        *("moves/batch 256", "moves/batch 64", "moves/batch 16"),
        "heads/bf16",
        *("model/batch 256", "model/batch 1", "model/batch 64", "model/batch 16") * 2,
        "heads/bf16",
        *("model/batch 256", "model/batch 1"),
        "rates/gemm fp32",
        "heads/fp32",
    ]
    before = names[: names.index("model/batch 256/dense eager")]
    assert all("/batch 256/" in name for name in before if name.startswith("heads"))
    group = [name for name in names if name.startswith("moves/batch 64/50")]
    assert [name.rpartition("/")[2] for name in group] == [
        "copy",
        "compact_",
        "end_exit_",
        "gather",
    ]


class TestMemcheck:
    def test_runs_the_calls_under_the_tool_without_cached_memory(self, tmp_path, monkeypatch):
        tool, told = tmp_path / "bin" / "compute-sanitizer", tmp_path / "told"
        tool.parent.mkdir()
        tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" > {told}\nexit 7\n')
        tool.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert memcheck.main([]) == 7
        said = told.read_text()
        assert said.startswith("1 --tool memcheck --error-exitcode 7 ")
        assert said.endswith(" -m benchmarks.gpu_check.memcheck --calls\n")

    def test_says_so_without_the_tool(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("PATH", str(tmp_path))
        assert memcheck.main([]) == 0
        assert "nothing checked" in capsys.readouterr().out


def value(number, **more):
    return lambda known: Measured(number, **more)


def raising(known):
    raise RuntimeError("out of registers")


def read(record):
    return json.loads(record.path.read_text())


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "gpu.json", 60, {"commit": "abc"})


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (Measured(7.0), "measured"),
        (Measured(7.0, target=7.0), "pass"),
        (Measured(7.1, target=7.0), "miss"),
        (Measured(7.0, target=7.0, at_least=True), "pass"),
        (Measured(6.9, target=7.0, at_least=True), "miss"),
    ],
    ids=["no target", "at most", "above", "at least", "below"],
)
def test_verdict(measured, verdict):
    assert measured.verdict == verdict


def test_a_row_that_raises_is_a_row_with_its_error(record):
    rows = [
        Row("a", "us", value(4.0)),
        Row("b", "us", raising),
        ratio("a over b", "a", "b"),
        Row("c", "us", value(8.0)),
        ratio("a over c", "a", "c", 3.0),
        Row("d", "us", value(float("nan"))),
    ]
    record.run(rows)
    found = {row["name"]: row for row in read(record)["rows"]}
    assert [row["status"] for row in found.values()] == [
        *("measured", "failed", "skipped", "measured", "miss", "failed")
    ]
    assert found["b"]["reason"] == "RuntimeError: out of registers"
    assert "'b', which has no value" in found["a over b"]["reason"]
    assert found["a over c"]["measured"] == 2.0 and found["a over c"]["target"] == 3.0
    assert record.count("failed") == 2


def test_the_json_is_whole_when_killed_at_any_row(record):
    """A kill within a row leaves the file as that row finds it."""
    names = [f"row {i}" for i in range(5)]

    def reading(known):
        found = read(record)
        assert found["finished"] is False and found["commit"] == "abc"
        assert [row["name"] for row in found["rows"]] == names[: len(known)]
        assert all("seconds" in row for row in found["rows"])
        return Measured(1.0)

    record.run([Row(name, "us", reading) for name in names])
    assert [row["status"] for row in record.rows] == ["measured"] * 5
    assert read(record)["finished"] is True


@pytest.mark.parametrize("last", range(4))
def test_the_json_is_whole_when_killed_as_it_is_written(record, monkeypatch, last):
    replace, written = os.replace, []

    def killed(*paths):
        if len(written) == last:
            raise KeyboardInterrupt
        written.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.run([Row(f"row {i}", "us", value(1.0)) for i in range(4)])
    assert [row["name"] for row in read(record)["rows"]] == [f"row {i}" for i in range(last)]


def test_the_budget_stops_the_row_that_runs_and_skips_the_rest(tmp_path):
    record = Record(tmp_path / "gpu.json", 0.3, {})

    def endless(known):
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # as a library that takes any error for its own
            return Measured(0.0)

    record.run([Row("a", "us", value(1.0)), Row("b", "us", endless), Row("c", "us", value(1.0))])
    content = read(record)
    assert [row["status"] for row in content["rows"]] == ["measured", "skipped", "skipped"]
    assert content["rows"][1]["reason"] == "stopped: the 0.3 s are up"
    assert content["rows"][2]["reason"] == "the 0.3 s are up"
    assert content["budget_s"] == 0.3 and content["finished"] is True


def test_an_unknown_value_skips():
    with pytest.raises(Skipped, match="'rates/copy'"):
        Known()["rates/copy"]


class TestRowsOnTheStandIn:
    def test_wrong_logits_are_not_timed(self, record, monkeypatch):
        monkeypatch.setitem(operators.TOLERANCE, torch.bfloat16, -1.0)
        rows = operators.heads(StandIn(), 2, torch.bfloat16, compiled=False)
        record.run(row for row in rows if row.name.endswith("gah_2/ours"))
        assert "from float64, allowed" in read(record)["rows"][0]["reason"]
        assert not torch.are_deterministic_algorithms_enabled()

    def test_rows_moved_wrongly_are_not_timed(self, record, monkeypatch):
        monkeypatch.setattr(StandIn, "compact", lambda gpu, tensors, keep, count: count.fill_(1))
        record.run(operators.moves(StandIn()))
        status = {row["name"].rpartition("/")[2]: row["status"] for row in record.rows}
        assert status["compact_"] == "failed" and status["end_exit_"] != "failed"

    def test_an_engine_that_answers_wrongly_is_not_timed(self, record, monkeypatch):
        monkeypatch.setattr(whole_model, "TOLERANCE", -1.0)
        case = whole_model.cache(lambda: whole_model._Case(StandIn(), StandIn().model, 2))
        engine = whole_model.cache(lambda: whole_model._engine(case))
        with pytest.raises(AssertionError, match="not timed"):
            whole_model._ours(case, engine, TRACES["0.9"], Known())

    def test_plain_heads_use_none_of_the_kernels(self, monkeypatch):
        chosen = []
        monkeypatch.setattr(
            StandIn,
            "time",
            lambda gpu, call: chosen.append(operators.ops.dispatch.chosen_backend()) or call(),
        )
        operators._Head(StandIn(), "gah_2", 2, torch.bfloat16).plain(False)
        assert chosen == ["torch"]


def test_large_moves_are_held_to_the_copy_beside_them():
    gpu = StandIn()
    case = whole_model.cache(lambda: operators._Moves(gpu, 3, 1))
    for copy, target in ((1.0, operators.FEWEST_US), (100.0, 125.0)):
        found = operators._move(case, "copy", "compact_", Known({"copy": copy}))
        assert found.target == pytest.approx(target)
        assert found.facts["rows_moved"] == 1


@pytest.mark.parametrize(
    ("batch", "threshold", "target"),
    [(256, "0.8", 1.9), (1, "0.8", 1.7), (64, "0.8", None), (256, "0.9", 1.9 * 1.859 / 2.078)],
)
def test_targets_of_the_model(batch, threshold, target):
    found = whole_model._target(batch, Gpu().sizes.batches, TRACES[threshold])
    assert found is None if target is None else found == pytest.approx(target, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("lph_full", 196), ("lph_light", 196), ("gah_2", 2 * 49), ("gah_3", 2 * 25)],
)
def test_floor_counts_the_unavoidable_gemm(kind, tokens):
    assert operators._flops(kind, 256, (14, 14), 768) == 2 * 256 * tokens * 768**2
