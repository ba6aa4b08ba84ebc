"""Interrupts in a stream, at any bytecode: each image is still answered once, as itself.

`run(count, seed)` tries random cases; `walk` tries every bytecode of one case in turn. The engine is a
stand-in whose segments cost nothing; the stream, its reader and its lock are the real ones.
"""

from __future__ import annotations

import dis
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from lgvit_fast.inference import graphs, reader, slots, streaming, turns
from lgvit_fast.inference.graphs import Graphs, capture_eager
from lgvit_fast.inference.streaming import Stream
from lgvit_fast.ops.exit_step import ExitStep
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import Policy

CPU = torch.device("cpu")
FILES = {module.__file__ for module in (streaming, slots, graphs, reader, turns)}
NUM_EXITS = 2


@dataclass(frozen=True)
class Case:
    """A loader, a stream over it, and the interrupts that come on the way.

    Attributes:
        sizes: images of each of the loader's batches.
        batch_size: of the stream.
        order: of the answers.
        generator: the loader is a generator, whose own code may be interrupted; else a list.
        threaded: the loader is read in a thread.
        graphs: full batches are replayed.
        points: bytecodes between one interrupt and the next.
        error: what an interrupt raises.
    """

    sizes: tuple[int, ...] = (3, 0, 4, 2)
    batch_size: int = 3
    order: str = "input"
    generator: bool = False
    threaded: bool = False
    graphs: bool = False
    points: tuple[int, ...] = ()
    error: type[BaseException] = KeyboardInterrupt


@dataclass
class Outcome:
    """What came of a case: `fired` interrupts, `in_loader` among them, and the answers."""

    fired: int = 0
    in_loader: int = 0
    answers: list[Any] = field(default_factory=list)
    failure: BaseException | None = None
    last: list[Any] = field(default_factory=list)


class Segment:
    """A segment whose images carry their number; image i leaves at exit i mod 3.

    An image's state counts the segments it has passed.
    """

    def __init__(self, index: int) -> None:
        self.index, self.start, self.stop = index, index, index + 1
        self.is_last = index == NUM_EXITS
        self.adapter = SimpleNamespace(embed=torch.clone, patch_grid=lambda size, stop: (1, 1))

    def rule(self, policy: Policy) -> None:
        return None

    def __call__(self, tokens: Any, state: Any, grid: Any, rule: None) -> Any:
        numbers = tokens.flatten(1)[:, 0]
        leave = (numbers % 3 == self.index) | self.is_last
        logits = torch.stack([numbers, state[:, 0].to(numbers)], dim=1)
        state[:, 0] += 1
        return tokens.clone(), ExitStep(logits, leave, torch.ones_like(leave))


def fake_engine(replaying: bool = False) -> Any:
    """What a stream asks of an engine, with segments that cost nothing."""
    model = SimpleNamespace(
        num_blocks=NUM_EXITS + 1,
        class_names=None,
        parameters=lambda: iter([torch.zeros(1)]),
        admit=lambda images, policy: policy,
        blank=lambda rows, device: Inference.blank(rows, 2, torch.float32, device),
    )
    segments = tuple(Segment(index) for index in range(NUM_EXITS + 1))
    return SimpleNamespace(
        exits=(1, 2),
        model=model,
        segments_for=lambda images: segments,
        new_graphs=lambda: Graphs(capture_eager, CPU, nn.Identity()) if replaying else None,
    )


def batches(case: Case) -> list[Any]:
    found, start = [], 0
    for size in case.sizes:
        numbers = torch.arange(start, start + size)
        found.append((numbers.float().view(-1, 1, 1, 1), numbers.tolist()))
        start += size
    return found


def generate(items: list[Any]) -> Iterator[Any]:
    for item in items:
        ready = item
        yield ready


class Interrupter:
    """Raises at chosen bytecodes of the stream's own code and of the generator's."""

    def __init__(self, case: Case, outcome: Outcome, recording: bool = False) -> None:
        self.recording = recording
        self.points, self.error, self.outcome = list(case.points), case.error, outcome
        self.count = 0
        self.first: dict[tuple[Any, int], int] = {}  # when each bytecode ran for the first time

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        in_loader = frame.f_code is generate.__code__
        if frame.f_code.co_filename not in FILES and not in_loader:
            return None
        for place in (frame, frame.f_back):
            if place is not None and place.f_code is Stream.__del__.__code__:
                return None  # of an earlier stream; what is raised there goes nowhere
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event != "opcode" or _hands_over(frame):
            return self
        if self.recording:
            self.first.setdefault((frame.f_code, frame.f_lasti), self.count)
        self.count += 1
        if self.points and self.count > self.points[0]:
            self.points.pop(0)
            self.count = 0
            self.outcome.fired += 1
            self.outcome.in_loader += in_loader
            raise self.error
        return self


def _hands_over(frame: FrameType) -> bool:
    """Whether the next bytecode gives an answer to the caller: no interrupt comes just before it."""
    if frame.f_code is not Stream.__next__.__code__:
        return False
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")


def play(case: Case, tracer: Interrupter | None = None) -> Outcome:
    """Iterate a stream to its end, going on after every interrupt."""
    outcome, items = Outcome(), batches(case)
    loader = generate(items) if case.generator else items
    running = Stream(
        fake_engine(case.graphs), loader, case.batch_size, case.order, Policy(),
        60.0 if case.threaded else None, 64,
    )  # fmt: skip
    tracer = tracer or Interrupter(case, outcome)
    before = sys.gettrace()
    for _ in range(1000):
        sys.settrace(tracer if tracer.points or tracer.recording else before)
        try:
            answer = next(running)
            sys.settrace(before)
            outcome.answers.append(answer)
        except StopIteration:
            break
        except (case.error, RuntimeError) as error:
            outcome.failure = error
        finally:
            sys.settrace(before)
    else:
        raise AssertionError(f"{case} does not end")
    outcome.last = running.close()
    return outcome


def check(case: Case, outcome: Outcome) -> None:
    """Every image once, as itself; all of them unless the loader's own code was interrupted."""
    indices = [answer.index for answer in outcome.answers]
    total = sum(case.sizes)
    assert not outcome.last, (case, outcome.last)
    if outcome.in_loader:
        assert len(indices) in [sum(case.sizes[:n]) for n in range(len(case.sizes) + 1)], case
        notes = getattr(outcome.failure, "__notes__", [])
        assert notes == [f"in a stream, after {len(indices)} images"], (case, notes)
    else:
        assert len(indices) == total, (case, indices)
    assert sorted(indices) == list(range(len(indices))), (case, indices)
    assert case.order == "completion" or indices == sorted(indices), (case, indices)
    for answer in outcome.answers:
        expected = (answer.index, answer.index % 3)
        assert (answer.target, answer.exit_index) == expected, (case, answer)
        assert answer.logits.tolist() == list(expected), (case, answer)


def walk(case: Case, every_time: bool = False) -> int:
    """Interrupt a case at every bytecode, one after another; how many interrupts that were.

    Args:
        case: without points.
        every_time: each time a bytecode runs, not only the first.
    """
    whole = Interrupter(case, Outcome(), recording=True)
    play(case, whole)
    points = range(whole.count) if every_time else sorted(whole.first.values())
    fired = 0
    for point in points:
        tried = replace(case, points=(point,))
        outcome = play(tried)
        check(tried, outcome)
        fired += outcome.fired
    return fired


def run(count: int, seed: int) -> dict[str, int]:
    """Random cases with up to 6 interrupts each; `failures` is to be 0."""
    draw = random.Random(seed)
    found = {"cases": 0, "interrupts": 0, "images": 0, "failures": 0}
    for number in range(count):
        case = Case(
            sizes=tuple(draw.randrange(6) for _ in range(draw.randrange(6))),
            batch_size=draw.randint(1, 5),
            order=draw.choice(["input", "completion"]),
            generator=draw.random() < 0.3,
            threaded=draw.random() < 0.2,
            graphs=number % 2 == 1,
            points=tuple(draw.randrange(1200) for _ in range(draw.randint(1, 6))),
            error=draw.choice([KeyboardInterrupt, TimeoutError]),
        )
        try:
            outcome = play(case)
            check(case, outcome)
            found["interrupts"] += outcome.fired
            found["images"] += len(outcome.answers)
        except Exception as error:
            found["failures"] += 1
            print(f"stream fuzz: {case}: {type(error).__name__}: {error}", file=sys.stderr)
        found["cases"] += 1
    return found
