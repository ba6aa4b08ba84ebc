"""The runs of a stream: a fault at any operation, waits for the device, and the memory of slots."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lgvit_fast
from lgvit_fast.inference import Engine, slots, stream, streaming
from tests.fuzz import stream_fuzz
from tests.helpers import images, tiny_model


class Device:
    """Stands in for a GPU, which finishes what was launched only when somebody waits for it.

    Attributes:
        waits: for each real wait, what was waited for, "run" or "copy", and how many runs were
            launched behind it: with 0 the device stands still until the host goes on.
    """

    def __init__(self, monkeypatch):
        self.launched, self.finished, self.waits = [], 0, []
        monkeypatch.setattr(slots, "mark", lambda device: Event(self, "run"))
        monkeypatch.setattr(streaming, "mark", lambda device: Event(self, "copy"))


class Event:
    def __init__(self, device, kind):
        device.launched.append(kind)
        self.device, self.kind, self.number = device, kind, len(device.launched)

    def query(self):
        return self.number <= self.device.finished

    def synchronize(self):
        if not self.query():
            behind = self.device.launched[self.number :].count("run")
            self.device.waits.append((self.kind, behind))
            self.device.finished = self.number


class FaultAt(TorchDispatchMode):
    """An interrupt before one operation."""

    def __init__(self, number):
        super().__init__()
        self.left, self.raised = number, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == -1:
            self.raised = True
            raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("backend", "late", "graphs"),
    [("auto", False, False), ("torch", False, False), ("auto", True, False), ("auto", True, True)],
    ids=["one-op", "torch", "device", "graphs"],
)
def test_a_fault_at_any_operation_loses_nothing(backend, late, graphs, monkeypatch):
    if late:
        Device(monkeypatch)
    case = stream_fuzz.Case(sizes=(3, 1), batch_size=2, order="completion")
    if graphs:  # of the images' six runs two are the first of a segment, one of its last
        case = replace(case, batch_size=1, graphs=True)
    with FaultAt(1000) as fault:
        stream_fuzz.batches(case)  # `play` makes these first
    first = number = 1000 - fault.left
    fault.raised = True
    while fault.raised:
        with lgvit_fast.ops.backend(backend), FaultAt(number) as fault:
            outcome = stream_fuzz.play(case)
        assert isinstance(outcome.failure, KeyboardInterrupt) == fault.raised
        stream_fuzz.check(case, outcome)
        number += 1
    assert number - first > 100


@pytest.mark.parametrize("order", ["input", "completion"])
def test_while_the_host_waits_the_device_has_work(monkeypatch, order):
    device, model = Device(monkeypatch), tiny_model(exits=[2, 3, 5])
    given, policy = images(96), lgvit_fast.Replay([0, 1, 2, 3, 3, 1] * 16)
    running = stream(Engine(model, graphs=False), given.split(8), 8, order=order, policy=policy)
    answers = sorted(running, key=lambda answer: answer.index)
    expected = model.infer(given, policy)
    assert [a.exit_index for a in answers] == expected.exit_index.tolist()
    got = torch.stack([a.logits for a in answers])
    torch.testing.assert_close(got, expected.logits, atol=1e-4, rtol=1e-4)

    report = running.report()
    runs = sum(segment.runs for segment in report.segments)
    assert [kind for kind, _ in device.waits].count("run") == runs  # one each
    assert [wait for wait in device.waits if wait[1] == 0] == [("run", 0)]  # for the last of all
    assert all(len(buffer) <= 4 * 8 for buffer in running._slots._tokens.values())
