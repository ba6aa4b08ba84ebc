"""Engines and streams asked from inside themselves, from a signal handler, and in a forked child."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

import lgvit_fast
from lgvit_fast.inference import Engine, stream
from tests.helpers import images, tiny_model

POOL = images(8)


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model(exits=[2, 3, 5]), runtime="torch", graphs=False)


class Asking(lgvit_fast.Patience):
    """A policy that does something in the middle of a batch."""

    def __init__(self, ask):
        super().__init__(2)
        object.__setattr__(self, "ask", ask)

    def decide(self, leave, state, exit_index):
        self.ask()
        return leave


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", ["call", "segments", "release", "warm_up"])
def test_an_engine_asked_from_its_own_policy(engine, what):
    asks = {
        "call": lambda: engine(POOL),
        "segments": lambda: engine.segments,
        "release": engine.release,
        "warm_up": lambda: engine.warm_up(POOL),
    }
    with pytest.raises(RuntimeError, match="the engine is answering a batch; it cannot be asked"):
        engine(POOL, Asking(asks[what]))
    assert len(engine(POOL).logits) == 8  # and it is free again


@pytest.mark.timeout(30)
def test_a_stream_asked_from_its_own_policy_or_loader(engine):
    running = stream(engine, [POOL], 4, policy=Asking(lambda: next(running)))
    with pytest.raises(RuntimeError, match="the stream is answering a batch"):
        next(running)
    closing = stream(engine, [POOL], 4, policy=Asking(lambda: closing.close()))
    with pytest.raises(RuntimeError, match="the stream is answering a batch"):
        next(closing)

    def loader():
        yield next(asking)

    asking = stream(engine, loader(), 4)
    with pytest.raises(RuntimeError, match="the stream is answering a batch"):
        next(asking)


@pytest.mark.timeout(30)
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no signals")
def test_an_engine_asked_from_a_signal_handler(engine):
    seen = []

    def handler(number, frame):
        try:
            engine(POOL)
        except RuntimeError as error:
            seen.append(str(error))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        answer = engine(POOL, Asking(lambda: signal.raise_signal(signal.SIGUSR1)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(answer.logits) == 8
    assert seen and all("the engine is answering a batch" in error for error in seen)


@pytest.mark.timeout(30)
def test_threads_still_take_turns(engine):
    expected = engine(POOL).logits
    found = []
    threads = [threading.Thread(target=lambda: found.append(engine(POOL))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answer.logits, expected) for answer in found) and len(found) == 3


FORK = """
import os, threading
import torch
torch.set_num_threads(1)
import lgvit_fast
from lgvit_fast.inference import Engine, stream
from tests.helpers import images, tiny_model

engine = Engine(tiny_model(exits=[2, 3, 5]), graphs=False)
pool = images(8)
expected = engine(pool).logits
inside, leave = threading.Event(), threading.Event()

class Slow(lgvit_fast.Patience):
    def decide(self, leave_, state, exit_index):
        inside.set()
        leave.wait(60)
        return leave_

running = stream(engine.model, [pool, pool], 4, policy=Slow(2))
threads = [threading.Thread(target=engine, args=(pool, Slow(2))),
           threading.Thread(target=next, args=(running,))]
for thread in threads:
    thread.start()
    inside.wait()
    inside.clear()
child = os.fork()
if not child:  # the other threads are not here, their locks would be
    leave.set()
    same = torch.equal(engine(pool).logits, expected)
    indices = [answer.index for answer in running]
    os._exit(0 if same and indices == list(range(16)) else 3)
leave.set()
for thread in threads:
    thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_during_a_call_can_ask():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.strip() == "0", done.stderr
