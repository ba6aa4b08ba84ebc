import argparse
import json
from dataclasses import replace

import pytest
import torch

import lgvit_fast
from lgvit_fast.bench import model as bench
from lgvit_fast.bench.published_scheme import PublishedScheme
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


def test_rows_of_a_tiny_model(tmp_path):
    model = tiny_model(exits=[2, 3, 5])
    script = lgvit_fast.Replay([0, 0, 1, 2, 3, 0])
    chosen = bench.ways(model, 4, compiled=False)
    rows = bench.bench_model(model, images(6), script, 4, chosen, rounds=2)
    assert [row.way for row in rows] == [way.name for way in chosen]
    assert rows[0].speedup == 1
    for row in rows:
        dense = row.way == row.like
        assert row.layer_ratio == pytest.approx(1 if dense else 36 / (2 * 3 + 3 + 5 + 6))
        assert row.images_per_second == pytest.approx(1000 / row.ms_per_image)
        assert row.spread[0] <= row.speedup <= row.spread[1]
        assert row.working_mib > 0
        assert (row.p50_ms is None) == (row.way == "stream")
    bench.plot([*rows, *(replace(row, batch_size=8) for row in rows)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    table = bench.markdown(rows).splitlines()
    assert len(table) == len(rows) + 2
    assert len({line.count("|") for line in table}) == 1


def test_the_published_scheme_is_measured_in_float32():
    model = tiny_model(exits=[2, 3])
    policy = lgvit_fast.Replay([0, 2, 1])
    for dtype, name in (
        (torch.float32, "published scheme"),
        (torch.bfloat16, "published scheme, float32"),
    ):
        way = next(w for w in bench.ways(model.to(dtype), 4, compiled=False) if w.name == name)
        (call,) = way.start(images(3).to(dtype), policy, 4)
        assert call().dtype == torch.float32


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "create_model", lambda *a, **k: tiny_model(exits=list(k["exits"])))
    monkeypatch.setattr(lgvit_fast.LGViT, "pretrained_cfg", {"input_size": (3, 32, 32)})
    trace = tmp_path / "trace.json"
    trace.write_text('{"name": "mine", "layers": [2, 4, 6], "images": [5, 3, 2]}')
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    out = tmp_path / "rows.json"
    given = f"--trace {trace} --batch-size 2 --images 4 --rounds 1 --no-compile --json {out}"
    assert bench.run(parser.parse_args([*given.split(), "--only", "infer"])) == 0
    assert "mine" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [row["way"] for row in written["rows"]] == ["dense timm", "infer"]
    assert bench.run(parser.parse_args([*given.split(), "--plan", "--only", "engine"])) == 0
    assert "planned exits [" in capsys.readouterr().out
    plan = json.loads(out.read_text())["plans"][0]
    assert set(plan["exits"]) <= {2, 4}
    assert plan["measured_ms"] > 0
    assert written["machine"]["torch"] == torch.__version__


def test_a_trace_of_another_depth_is_refused(tmp_path):
    trace = tmp_path / "trace.json"
    trace.write_text('{"layers": [2, 4, 6], "images": [5, 3, 2]}')
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    with pytest.raises(ValueError, match="12"):
        bench.run(parser.parse_args(["--trace", str(trace), "--model", "vit_tiny_patch16_224"]))
