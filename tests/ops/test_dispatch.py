"""The rule that picks a backend: automatic, by argument, by context manager, by environment."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from lgvit_fast import _extension
from lgvit_fast.ops import backend, dispatch
from lgvit_fast.ops.dispatch import Backend, Op


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """Ops made by a test are gone after it, and so is the memory of what was logged."""
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_logged", set())


@pytest.fixture
def op():
    """Adds 100, 10 or 1: triton needs a GPU (never here), cpp float32, torch nothing."""
    return Op(
        "add",
        Backend("triton", lambda x: x + 100, missing=lambda device: "it needs a GPU"),
        Backend("cpp", lambda x: x + 10, refuse=lambda x: _only_float32(x)),
        Backend("torch", lambda x: x + 1),
    )


def _only_float32(x):
    return None if x.dtype == torch.float32 else f"it takes float32, not {x.dtype}"


ZERO = torch.zeros(())
ZERO64 = torch.zeros((), dtype=torch.float64)


def test_automatic_takes_first_that_can(op):
    assert op(ZERO) == 10
    assert op(ZERO64) == 1
    assert op.choose(ZERO).name == "cpp"


def test_auto_argument_overrides_the_choice_in_force(op):
    with backend("torch"):
        assert op(ZERO, backend="auto") == 10


def test_each_reason_is_logged_once(op, caplog):
    with caplog.at_level(logging.INFO, logger="lgvit_fast"):
        for _ in range(3):
            op(ZERO64)
    assert [record.getMessage() for record in caplog.records] == [
        "add: not on triton: it needs a GPU",
        "add: not on cpp: it takes float32, not torch.float64",
    ]


@pytest.mark.parametrize(("name", "expected"), [("cpp", 10), ("torch", 1)])
@pytest.mark.parametrize("how", ["argument", "context"])
def test_explicit_choice_is_followed(op, name, expected, how):
    if how == "argument":
        assert op(ZERO, backend=name) == expected
    else:
        with backend(name):
            assert op(ZERO) == expected


@pytest.mark.parametrize("how", ["argument", "context"])
@pytest.mark.parametrize(
    ("name", "x", "reason"),
    [("triton", ZERO, "it needs a GPU"), ("cpp", ZERO64, "it takes float32")],
    ids=["missing", "refused"],
)
def test_explicit_choice_that_cannot_run_raises(op, name, x, reason, how):
    with pytest.raises(RuntimeError, match=f"add: backend '{name}' cannot run: {reason}"):
        if how == "argument":
            op(x, backend=name)
        else:
            with backend(name):
                op(x)


def test_unknown_name_raises(op):
    with pytest.raises(ValueError, match="one of auto, triton, cpp, torch; got 'cuda'"):
        op(ZERO, backend="cuda")
    with pytest.raises(ValueError, match="got 'cuda'"), backend("cuda"):
        pass


def test_op_without_such_a_backend():
    op = Op("plain", Backend("cpp", lambda x: x + 10), Backend("torch", lambda x: x + 1))
    with backend("triton"):
        assert op(ZERO) == 10
    with pytest.raises(RuntimeError, match="no 'triton' backend, only cpp, torch"):
        op(ZERO, backend="triton")


def test_reference_must_come_last():
    with pytest.raises(ValueError, match="last backend"):
        Op("wrong", Backend("torch", abs), Backend("cpp", abs))


def test_context_nests_and_restores_after_an_error(op):
    with backend("torch"):
        with pytest.raises(ZeroDivisionError), backend("cpp"):
            assert op(ZERO) == 10
            raise ZeroDivisionError
        assert op(ZERO) == 1
    assert op(ZERO) == 10


def test_context_holds_in_its_own_thread_only(op):
    results = {}
    entered, done = threading.Event(), threading.Event()

    def inside():
        with backend("torch"):
            entered.set()
            done.wait(10)
            results["inside"] = float(op(ZERO))

    thread = threading.Thread(target=inside)
    thread.start()
    assert entered.wait(10)
    results["outside"] = float(op(ZERO))
    done.set()
    thread.join()
    assert results == {"inside": 1, "outside": 10}


def test_arguments_reach_refuse_and_run():
    def run(x, scale, *, shift):
        return x * scale + shift

    def refuse(x, scale, *, shift):
        return "shift is odd" if shift % 2 else None

    op = Op("affine", Backend("cpp", run, refuse=refuse), Backend("torch", lambda *a, **k: "torch"))
    assert op(ZERO + 3, 2, shift=4) == 10
    assert op(ZERO + 3, 2, shift=5) == "torch"


def test_report_names_backend_and_reasons(op):
    (row,) = dispatch.report("cpu")
    assert row == ("add", "cpp", {"triton": "it needs a GPU"})


def test_compiles_without_graph_break_and_follows_the_choice(op):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x * 1) * 1, backend="eager", fullgraph=True)
    assert compiled(ZERO) == 10
    assert compiled(ZERO64) == 1
    with backend("torch"):
        assert compiled(ZERO) == 1
    assert compiled(ZERO) == 10


def test_the_extension_answers_inside_a_compiled_graph():
    def answer(x):
        return x + (10 if _extension.why_missing(x.device) is None else 1)

    torch._dynamo.reset()
    assert torch.compile(answer, backend="eager", fullgraph=True)(ZERO) == answer(ZERO)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("torch", "answer 1"),
        ("cpp", "RuntimeError"),
        ("gpu", "LGVIT_BACKEND must be one of"),
    ],
)
def test_environment_variable(value, expected):
    code = (
        "import torch\n"
        "from lgvit_fast.ops.dispatch import Backend, Op\n"
        "no = Backend('cpp', None, refuse=lambda x: 'no')\n"
        "print('answer', Op('add', no, Backend('torch', lambda x: 1))(torch.zeros(1)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LGVIT_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout + done.stderr
