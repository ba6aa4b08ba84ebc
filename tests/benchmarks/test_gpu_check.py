"""The GPU check's own logic at tiny sizes on the CPU, so that it works once a GPU is there."""

import subprocess

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Check, Sizes, Skipped

TINY = Sizes(batches=(3,), dtypes=(torch.float32,), width=64, grid=(4, 4), num_classes=5, gemm=64)


@pytest.fixture
def check():
    return Check(torch.device("cpu"), seconds=300, sizes=TINY)


def test_heads_are_checked_then_timed(check, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call: call)  # the compiler is not what is tested
    record = gpu_check.run(check, (gpu_check.heads,))
    entry = record["parts"]["heads"]
    assert entry["status"] == "done"
    assert [row["head"] for row in entry["rows"]] == list(gpu_check.HEADS)
    for row in entry["rows"]:
        assert row["error"] <= 2e-5
        assert row["fused_us"]["p50"] > 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_numerics_fail_the_part(check, monkeypatch):
    monkeypatch.setitem(gpu_check.TOLERANCE, torch.float32, -1.0)
    entry = gpu_check.run(check, (gpu_check.heads,))["parts"]["heads"]
    assert entry["status"] == "failed"
    assert "relative error" in entry["reason"]


def test_parts_are_told_apart(check):
    def done(_):
        return {"figure": 1}

    def skipped(_):
        raise Skipped("no such tool")

    def failed(_):
        raise subprocess.TimeoutExpired("pytest", 30)

    parts = gpu_check.run(check, (done, skipped, failed))["parts"]
    assert [entry["status"] for entry in parts.values()] == ["done", "skipped", "failed"]
    assert parts["skipped"]["reason"] == "no such tool"
    check.seconds = 0
    assert gpu_check.run(check, (done,))["parts"]["done"]["reason"] == "the time is up"


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("lph_full", 196), ("lph_light", 196), ("gah_2", 2 * 49), ("gah_3", 2 * 25)],
)
def test_floor_counts_the_unavoidable_gemm(kind, tokens):
    assert gpu_check._gemm_flops(kind, 256, Sizes()) == 2 * 256 * tokens * 768**2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_so_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
