"""A process that answers, stands still between requests, and says how it failed."""

import os
import signal
import time
from pathlib import Path

import pytest

from lgvit_fast.isolated import Failure, Isolated


def maker(what):
    """What the process does with a request."""
    if what == "refuse":
        raise ValueError("there is\n  no such thing")
    return {"add": lambda x: x + 1, "die": lambda x: os.kill(os.getpid(), signal.SIGKILL),
            "raise": lambda x: [][x], "hang": lambda x: time.sleep(60)}[what]  # fmt: skip


def state(process):
    """Linux's letter for what a process is doing."""
    return Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_it_answers_and_is_stopped_between_requests():
    process = Isolated(maker, "add", timeout=60)
    try:
        for request in (1, 5):
            deadline = time.monotonic() + 20
            while state(process) != "T":
                assert time.monotonic() < deadline, "it still runs"
                time.sleep(0.01)
            assert process.ask(request) == request + 1
    finally:
        process.close()
    assert process._process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("what", "timeout", "expected"),
    [
        ("die", 60, "its process ended with code -9"),
        ("raise", 60, "IndexError: list index out of range"),
        ("hang", 0.2, "no answer within 0.2 s"),
    ],
)
def test_failures_are_told(what, timeout, expected):
    process = Isolated(maker, what, timeout=60)
    process._timeout = timeout
    try:
        with pytest.raises(Failure, match=f"^{expected}$"):
            process.ask(3)
    finally:
        process.close()


def test_what_cannot_be_made_is_told():
    with pytest.raises(Failure, match=r"^ValueError: there is no such thing$"):
        Isolated(maker, "refuse", timeout=60)
    with pytest.raises(Failure, match=r"within 0\.001 s"):
        Isolated(maker, "add", timeout=0.001)
