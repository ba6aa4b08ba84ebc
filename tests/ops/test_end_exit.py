"""end_exit_: who leaves is answered, who stays is packed, and nothing else is touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgvit_fast import _extension
from lgvit_fast.exit_rules import ExitStep
from lgvit_fast.ops.end_exit import Counts, end_exit_

BACKENDS = ["torch"] if _extension.why_compact_missing() else ["torch", "cpp"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BEFORE = -7  # what an answer holds that must not be written


class Case:
    """The arguments of one call: `batch` rows, of which `entering` hold images."""

    def __init__(self, batch, entering, classes, shape, dtype, device="cpu", seed=0, leaving=0.5):
        generator = torch.Generator().manual_seed(seed)

        def random(*size):
            return torch.randn(size, generator=generator)

        self.batch, self.entering = batch, entering
        self.logits = random(batch, classes).to(dtype).to(device)
        self.leave = (torch.rand(batch, generator=generator) < leaving).to(device)
        self.valid = (torch.rand(batch, generator=generator) < 0.8).to(device)
        self.tokens = random(batch, *shape).to(dtype).to(device)
        self.state = torch.randint(99, (batch, 3), dtype=torch.int32, generator=generator).to(
            device
        )
        answers = batch + 5
        self.rows = torch.randperm(answers - 1, generator=generator)[:batch].to(device)
        self.answer = (
            torch.full((answers, classes), BEFORE, dtype=dtype, device=device),
            torch.full((answers,), BEFORE, device=device),
            torch.full((answers,), BEFORE, device=device),
            torch.zeros(answers, dtype=torch.bool, device=device),
        )
        self.given = {name: value.clone() for name, value in self.moved.items()}
        self.counts = Counts(
            torch.tensor([entering], device=device),
            torch.full((1,), BEFORE, device=device),
            torch.full((1,), BEFORE).pin_memory() if device == "cuda" else None,
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    @property
    def moved(self):
        return {"tokens": self.tokens, "rows": self.rows, "state": self.state}

    def run(self, backend, wait, into=None):
        step = ExitStep(self.logits, self.leave, self.valid)
        found = end_exit_(
            step,
            self.tokens,
            self.rows,
            self.state,
            self.answer,
            3,
            8,
            into=into,
            counts=None if wait else self.counts,
            backend=backend,
        )
        if wait:
            return found
        assert found is None
        if self.counts.told is not None:
            torch.cuda.synchronize()
            assert torch.equal(self.counts.told, self.counts.survivors.cpu())
        assert int(self.counts.scratch) == 0
        return int(self.counts.survivors)

    def check(self, n, spare, into=None):
        """Everything that the docstring promises. `spare`: the answer's last row may hold anything."""
        real = torch.arange(self.batch) < self.entering
        leave, valid, rows = self.leave.cpu(), self.valid.cpu(), self.given["rows"].cpu()
        stay = real & ~leave
        assert n == int(stay.sum())

        last = len(self.answer[1]) - spare
        logits, index, layer, nonfinite = (part.cpu()[:last] for part in self.answer)
        gone = rows[real & leave]
        answered = torch.zeros(last, dtype=torch.bool)
        answered[gone] = True
        assert torch.equal(logits[gone], self.logits.cpu()[real & leave])
        assert (logits[~answered] == BEFORE).all()
        assert index.tolist() == [3 if yes else BEFORE for yes in answered]
        assert layer.tolist() == [8 if yes else BEFORE for yes in answered]
        flagged = torch.zeros(last, dtype=torch.bool)
        flagged[rows[real & ~valid]] = True
        assert torch.equal(nonfinite, flagged)

        # The survivors, each once, in one order in all that was moved.
        found = self.rows.cpu()[:n]
        places = {row: place for place, row in enumerate(rows.tolist())}
        order = torch.tensor([places[row] for row in found.tolist()], dtype=torch.int64)
        assert sorted(order.tolist()) == stay.nonzero().flatten().tolist()
        tokens = self.tokens if into is None else into
        assert torch.equal(tokens.cpu()[:n], self.given["tokens"].cpu()[order])
        assert torch.equal(self.state.cpu()[:n], self.given["state"].cpu()[order])
        if into is not None:
            assert torch.equal(self.tokens.cpu(), self.given["tokens"].cpu()) or n == self.batch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_promised(backend, device, data):
    batch = data.draw(st.integers(1, 40))
    wait = data.draw(st.booleans())
    entering = batch if wait else data.draw(st.integers(0, batch))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    shape = data.draw(st.sampled_from([(3, 4), (7,), (1, 1), (0,)]))
    leaving = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
    seed = data.draw(st.integers(0, 99))
    case = Case(
        batch, entering, data.draw(st.sampled_from([1, 5, 16])), shape, dtype, device, seed, leaving
    )
    n = case.run(backend, wait)
    case.check(n, spare=not wait and backend == "torch")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "entering"), [(1, 1), (9, 9), (24, 17), (300, 299)])
def test_survivors_go_to_another_buffer(backend, device, batch, entering):
    case = Case(batch, entering, 10, (5, 6), torch.float32, device)
    into = torch.full((batch + 2, 5, 6), float(BEFORE), device=device)
    n = case.run(backend, wait=False, into=into)
    if backend == "cpp":
        assert (into[n:] == BEFORE).all(), "no more than the survivors are written"
    case.check(n, spare=backend == "torch", into=into)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_only_survivors_beyond_the_count_move():
    case = Case(64, 64, 4, (8,), torch.float32, leaving=0.1)
    n = case.run("cpp", wait=True)
    changed = (case.tokens != case.given["tokens"]).any(1)
    stay = ~case.leave
    assert int(changed.sum()) == int(stay[n:].sum())


def test_an_answer_of_another_dtype_is_cast():
    case = Case(6, 6, 4, (8,), torch.float32, leaving=1.0)
    logits = torch.zeros(11, 4, dtype=torch.bfloat16)
    case.answer = (logits, *case.answer[1:])
    assert case.run(None, wait=True) == 0
    assert torch.equal(logits[case.given["rows"]], case.logits.bfloat16())


def replaced(**others):
    """A call of the operator itself with some arguments of a good one replaced."""
    case = Case(8, 8, 4, (8,), torch.float32)
    arguments = {
        "logits": case.logits,
        "leave": case.leave,
        "valid": case.valid,
        "tokens": case.tokens,
        "into": None,
        "rows": case.rows,
        "state": case.state,
        "answer": list(case.answer),
        "entering": None,
        "counts": [torch.zeros(1, dtype=torch.int64)],
        "scratch": None,
        "index": 0,
        "layer": 1,
    }
    values = {name: make(case) for name, make in others.items()}
    torch.ops.lgvit_fast.end_exit_(**{**arguments, **values})


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("leave", lambda case: case.leave.int(), "leave is Int"),
        ("leave", lambda case: case.leave[:, None], "leave must be"),
        ("valid", lambda case: case.valid[:7], r"valid is Bool \[7\]"),
        ("rows", lambda case: case.rows.int(), "rows is Int"),
        ("rows", lambda case: case.rows + 99, "there are 13 answers"),
        ("rows", lambda case: case.rows - 99, "there are 13 answers"),
        ("rows", lambda case: case.rows.repeat(2)[::2], "contiguous"),
        ("tokens", lambda case: case.tokens[:5], r"tokens: expected \[8"),
        ("tokens", lambda case: case.tokens.T.contiguous().T, "rows must be contiguous"),
        ("state", lambda case: case.state[:1].expand(8, 3), "rows overlap"),
        ("logits", lambda case: case.logits.double(), "the answer's"),
        ("logits", lambda case: case.logits[:, :3], "the answer's"),
        ("answer", lambda case: list(case.answer[:3]), "answer has 3 tensors"),
        ("answer", lambda case: [*case.answer[:3], case.answer[3][:4]], "nonfinite is Bool"),
        ("into", lambda case: torch.zeros(7, 8), "into is Float"),
        ("into", lambda case: torch.zeros(8, 9), "into is Float"),
        ("into", lambda case: case.tokens, "share memory"),
        ("into", lambda case: torch.zeros(1, 8).expand(8, 8), "rows overlap"),
        ("logits", lambda case: case.tokens[:, :4], "share memory"),
        ("entering", lambda case: torch.tensor([9]), "entering is 9"),
        ("entering", lambda case: torch.tensor([-1]), "entering is -1"),
        ("entering", lambda case: case.rows[:1], "share memory"),
        ("counts", lambda case: [torch.zeros(2, dtype=torch.int64)], r"count is Long \[2\]"),
        ("counts", lambda case: [case.rows[:1]], "share memory"),
        ("scratch", lambda case: torch.zeros(1, dtype=torch.int64), r"scratch is Long \[1\]"),
        ("scratch", lambda case: case.state[0, :1], "scratch share memory"),
    ],
)
def test_hostile_arguments_are_refused_before_anything_is_written(name, value, message):
    with pytest.raises(ValueError, match=message):
        replaced(**{name: value})


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_a_single_row_of_any_stride_is_seen_to_overlap():
    buffer = torch.zeros(16)
    state = buffer.as_strided((2, 1), (2, 1), 1)  # 4 of every 8 bytes
    answer = buffer.as_strided((1, 4), (2, 1))  # one row: its stride means nothing
    with pytest.raises(ValueError, match="share memory"):
        torch.ops.lgvit_fast.end_exit_(
            torch.zeros(2, 4),
            *(torch.zeros(2, dtype=torch.bool) for _ in range(2)),
            torch.zeros(2, 3),
            None,
            torch.zeros(2, dtype=torch.int64),
            state,
            [
                answer,
                *(torch.zeros(1, dtype=torch.int64) for _ in range(2)),
                torch.zeros(1, dtype=torch.bool),
            ],
            None,
            [],
            None,
            0,
            1,
        )


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_autograd_is_told():
    case = Case(8, 8, 4, (8,), torch.float32)
    versions = [tensor._version for tensor in (*case.moved.values(), *case.answer)]
    case.run("cpp", wait=True)
    after = [tensor._version for tensor in (*case.moved.values(), *case.answer)]
    assert all(new > old for new, old in zip(after, versions, strict=True))
    with pytest.raises(RuntimeError, match="has no gradient"):
        replaced(tokens=lambda case: case.tokens.requires_grad_())
