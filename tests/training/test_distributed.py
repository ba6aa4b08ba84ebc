"""Two processes train as one would, and go on exactly after one of them was killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lgvit_fast.checkpoints.files import load_weights
from lgvit_fast.training import loop, train

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# A restart would otherwise read the addresses of the processes before (docs/training.md).
ANEW = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# Two processes without a launcher: imports take longer than the training.
PAIR = """
import os, sys
import lgvit_fast.training
from lgvit_fast.cli import main
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
code = main(sys.argv[1:])
print("ended with", code, file=sys.stderr, flush=True)
if child:
    code = code or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(code)
"""
STAGES = ("stage1", "stage2")


@pytest.fixture
def distributed_config(small_config, tmp_path):
    """A config in a file, of both stages; without dropout, whose draws are each process's own."""

    def build(output, **fields):
        stage = {"epochs": 4}
        config = small_config(output, stage="both", stage1=stage, stage2=stage, **fields)
        config.model_kwargs.update(proj_drop_rate=0.0, drop_path_rate=0.0)
        file = tmp_path / f"{output}.json"
        config.save(file)
        return config, ("train", "--config", str(file), "--resume")

    return build


def start_pair(command):
    """Both write to one pipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", PAIR, *command],
        env=ENVIRONMENT | place,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(run, folder, count):
    """Until a stage has logged so many rows."""
    rows = Path(folder) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (rows.exists() and rows.read_text().count("\n") >= count):
        assert run.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def worker(launcher, rank):
    """The process of a rank that torchrun has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    (found,) = [
        int(child)
        for child in children
        if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    return found


@pytest.mark.timeout(150)
def test_two_processes_train_as_one_also_after_a_kill(distributed_config, metrics):
    """The loss of both stages, local heads' BatchNorm included, is one process's at the same batch.

    float32 sums in another order, so the curves differ by 1e-4 at most, relative. A killed process
    ends both, torchrun starts them again, and the outcome is bit for bit that of a run left alone.
    """
    one, _ = distributed_config("one", batch_size=256)
    train(one)
    whole, command = distributed_config("whole", batch_size=128)
    _, said = (pair := start_pair(command)).communicate(timeout=60)
    assert pair.returncode == 0, said
    for stage in STAGES:
        rows, expected = (metrics(Path(run.output) / stage) for run in (whole, one))
        assert [row["kind"] for row in rows] == [row["kind"] for row in expected]
        for row, wanted in zip(rows, expected, strict=True):
            if row.pop("kind") == wanted.pop("kind") == "train":
                assert row == pytest.approx(wanted, rel=1e-4), row["update"]

    killed, command = distributed_config("killed", batch_size=128)
    run = subprocess.Popen(
        [*TORCHRUN, "--max-restarts", "1", "-m", "lgvit_fast", *command], env=ENVIRONMENT | ANEW
    )
    try:
        wait_for_rows(run, Path(killed.output) / "stage2", 8)
        os.kill(worker(run.pid, rank=1), signal.SIGKILL)
        assert run.wait(60) == 0
    finally:
        run.kill()
    for stage in STAGES:
        left, right = (Path(run.output) / stage for run in (killed, whole))
        assert metrics(left) == metrics(right)
        found, wanted = (load_weights(folder / loop.CHECKPOINT) for folder in (left, right))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.timeout(100)
def test_a_process_whose_companion_was_killed_says_so(distributed_config):
    config, command = distributed_config("run", batch_size=128)
    pair = start_pair(command)
    try:
        wait_for_rows(pair, Path(config.output) / "stage1", 8)
        pair.kill()
        _, said = pair.communicate(timeout=20)  # until the other ends, too
    finally:
        pair.kill()
    said = [line for line in said.splitlines() if "Warning" not in line]
    assert said == [
        "lgvit-fast train: error: process 1 of 2 has lost another process of this run, which has"
        " ended, with an error of its own or killed, or cannot be reached; --resume goes on from the"
        " last checkpoint",
        "ended with 1",
    ]
