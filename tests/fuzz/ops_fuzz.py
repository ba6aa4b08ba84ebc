"""Seeded fuzz of the compiled CPU operators: each call equals its reference or is refused by a check.

    python -m tests.fuzz.ops_fuzz [cases] [seed]

Arguments are drawn at random, inside buffers of NaN; in about half of the cases one of them is then
spoiled. A call may end in a value equal to the float64 reference, or in an error. Anything else is a
failure: another value, a NaN from outside the arguments, a crash, a sanitizer's finding. The cases
run in a child process that tells where it is, so that a crash names its case and the rest still runs.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lgvit_fast.exit_rules import ExitStep
from lgvit_fast.ops.compact import compact_ as compact_op
from lgvit_fast.ops.end_exit import end_exit_ as end_exit_op
from lgvit_fast.ops.exit_step import ExitRule, exit_step_reference
from lgvit_fast.ops.gah import gah_pool_reference
from lgvit_fast.ops.lph import LPHWeights, lph_pool_reference
from tests.ops.hostile import cases as hostile_cases

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
INTEGERS = (-(2**63), -(2**62), -(2**32), -2, -1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**62, 2**63 - 1)


class Draw:
    """Random arguments of one case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice([torch.float32, torch.float32, torch.bfloat16])

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers; now and then a view into a larger buffer of NaN."""
        dtype = self.dtype if dtype is None else dtype
        values = (torch.randn(shape, generator=self.torch) * scale).to(dtype)
        if self.random.random() < 0.5:
            return values
        last = self.random.choice([0, 0, 3])
        padded = [size + self.random.randint(0, 2) for size in shape[:-1]]
        padded += [size + last for size in shape[-1:]]
        view = torch.full(padded, torch.nan, dtype=dtype)
        for dim, size in enumerate(shape):
            view = view.narrow(dim, padded[dim] - size, size)
        return view.copy_(values)

    def spoil(self, arguments: dict[str, object]) -> str:
        """Changes one argument for the worse; returns its name."""
        name = self.random.choice(list(arguments))
        value = arguments[name]
        if isinstance(value, bool):
            arguments[name] = not value
        elif isinstance(value, int):
            arguments[name] = self.random.choice(INTEGERS)
        elif isinstance(value, float):
            arguments[name] = self.random.choice([float("nan"), float("inf"), -1e300, 0.0])
        elif isinstance(value, list):
            place = self.random.randrange(len(value))
            arguments[name] = [self._spoiled(t) if i == place else t for i, t in enumerate(value)]
        elif isinstance(value, Tensor):
            arguments[name] = self._spoiled(value)
        return name

    def _spoiled(self, tensor: Tensor) -> Tensor | None:
        how = self.random.choice(["cut", "grow", "dtype", "dim", "free", "short", "turn", "spread"])
        if tensor.dim() == 0 or tensor.numel() == 0:
            how = "dtype"
        dim = self.random.randrange(max(tensor.dim(), 1))
        if how == "cut":
            return tensor.narrow(dim, 0, tensor.shape[dim] - 1)
        if how == "grow":
            return torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)
        if how == "dtype":
            kinds = (
                torch.float64,
                torch.float16,
                torch.int32,
                torch.bool,
                torch.bfloat16,
                torch.float32,
            )
            return tensor.to(self.random.choice(kinds))
        if how == "dim":
            return self.random.choice([tensor[None], tensor.flatten(), tensor[0]])
        if how == "turn":
            return tensor.transpose(0, -1)
        if how == "spread":
            return tensor.narrow(dim, 0, 1).expand(tensor.shape)
        clone = tensor.clone(memory_format=torch.contiguous_format)
        clone.untyped_storage().resize_(0 if how == "free" else clone.nbytes - 1)
        return clone


def grid(draw: Draw) -> tuple[dict[str, object], int]:
    r = draw.random
    batch, height, width, prefix = (
        r.choice([0, 1, 2, 5]),
        r.randint(1, 9),
        r.randint(1, 9),
        r.randint(0, 3),
    )
    channels = r.choice([1, 3, 8, 16, 17, 33, 64])
    tokens = draw.tensor(batch, prefix + height * width, channels)
    place = {"height": height, "width": width, "num_prefix_tokens": prefix}
    return {"tokens": tokens, **place}, channels


def lph(draw: Draw) -> dict[str, object]:
    a, c = grid(draw)
    a |= {"weight": draw.tensor(c, c, scale=c**-0.5), "bias": draw.tensor(c, dtype=torch.float32)}
    full = draw.random.random() < 0.6
    shapes = {"scale": (c,), "shift": (c,), "depthwise_weight": (c, 3, 3), "depthwise_bias": (c,)}
    for name, shape in shapes.items():
        a[name] = draw.tensor(*shape, dtype=torch.float32) if full else None
    return a


def gah(draw: Draw) -> dict[str, object]:
    a, c = grid(draw)
    heads = draw.random.choice([h for h in range(1, c + 1) if c % h == 0])
    a |= {"qk_weight": draw.tensor(2 * c, c, scale=c**-0.5), "num_heads": heads}
    return a | {"stride": draw.random.randint(1, 4), "average": draw.random.random() < 0.5}


def step(draw: Draw) -> dict[str, object]:
    r = draw.random
    batch, channels, rows, vectors = (
        r.choice([0, 1, 4, 9]),
        r.choice([1, 5, 16, 33]),
        r.randint(2, 5),
        r.randint(1, 2),
    )
    count, classes = r.randint(0, 2), r.choice([1, 2, 10, 37])
    columns = (vectors + count) * channels
    state = torch.randint(0, 3, (batch, 2), generator=draw.torch, dtype=torch.int32)
    return {
        "pooled": draw.tensor(batch, vectors, channels, dtype=torch.float32),
        "tokens": draw.tensor(batch, rows, channels),
        "num_class_tokens": count,
        "weight": draw.tensor(classes, columns, scale=columns**-0.5),
        "bias": draw.tensor(classes, dtype=torch.float32),
        "rule": r.randint(0, 4),
        "threshold": r.random() * 2,
        "patience": r.randint(1, 3),
        "state": state,
    }  # fmt: skip


def compaction(draw: Draw) -> dict[str, object]:
    r = draw.random
    batch = r.choice([0, 1, 2, 5, 33])
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
    tensors = []
    for i in range(r.randint(1, 4)):
        shape = [r.randint(0, 5) for _ in range(r.randint(0, 2))]
        rows = draw.tensor(batch, *shape, 1 + i, dtype=torch.float32, scale=50).to(r.choice(kinds))
        tensors.append(rows.contiguous())
    keep = torch.rand(batch, generator=draw.torch) < r.random()
    return {"tensors": tensors, "keep": keep, "count": torch.zeros(1, dtype=torch.int64)}


def end_exit(draw: Draw) -> dict[str, object]:
    r = draw.random
    batch, classes, width = r.choice([0, 1, 2, 5, 33]), r.choice([1, 5, 16]), r.randint(0, 9)
    answers = batch + r.randint(0, 3)
    kinds = (torch.float32, torch.bfloat16, torch.uint8)

    def flags(chance: float) -> Tensor:
        return torch.rand(batch, generator=draw.torch) < chance

    def rows(*shape: int) -> Tensor:
        return draw.tensor(*shape, dtype=torch.float32, scale=50).to(r.choice(kinds)).contiguous()

    logits, tokens = rows(batch, classes), rows(batch, width)
    return {
        "logits": logits,
        "leave": flags(r.random()),
        "valid": flags(0.8),
        "tokens": tokens,
        "into": torch.zeros(batch + 1, width, dtype=tokens.dtype) if r.random() < 0.5 else None,
        "rows": torch.randperm(answers, generator=draw.torch)[:batch],
        "state": rows(batch, r.randint(0, 3)),
        "answer": [
            torch.zeros(answers, classes, dtype=logits.dtype),
            torch.zeros(answers, dtype=torch.int64),
            torch.zeros(answers, dtype=torch.int64),
            torch.zeros(answers, dtype=torch.bool),
        ],
        "entering": torch.tensor([r.randint(0, batch)]) if r.random() < 0.5 else None,
        "counts": [torch.zeros(1, dtype=torch.int64) for _ in range(r.randint(1, 2))],
        "scratch": torch.zeros(1, dtype=torch.int32) if r.random() < 0.5 else None,
        "index": r.randint(0, 9),
        "layer": r.randint(1, 9),
    }


def check_lph(a: dict[str, object], got: Tensor) -> None:
    weights = LPHWeights(**{name: _double(a[name]) for name in LPHWeights._fields})
    place = (a["height"], a["width"])
    compare(
        got,
        lph_pool_reference(_double(a["tokens"]), place, a["num_prefix_tokens"], weights),
        a["tokens"].dtype,
    )


def check_gah(a: dict[str, object], got: Tensor) -> None:
    place, pool = (a["height"], a["width"]), "average" if a["average"] else "subsample"
    stride = min(a["stride"], max(place))
    tokens = _double(a["tokens"])
    if a["average"] and len(tokens) == 0:
        return
    expected = gah_pool_reference(
        tokens,
        place,
        a["num_prefix_tokens"],
        _double(a["qk_weight"]),
        a["num_heads"],
        stride,
        pool,
    )
    compare(got, expected, a["tokens"].dtype)


def check_step(a: dict[str, object], got: tuple[Tensor, ...]) -> None:
    names = ("pooled", "tokens", "num_class_tokens", "weight", "bias")
    inputs = {name: _double(a[name]) for name in names}
    rule = ExitRule(a["rule"], a["threshold"], a["patience"])
    step = exit_step_reference(
        **inputs, rule=rule, state=torch.zeros(a["state"].shape, dtype=torch.int32)
    )
    compare(got[0], step.logits, a["weight"].dtype)
    assert torch.equal(got[2], step.valid), "valid"
    assert not (got[1] & ~got[2]).any(), "left without a softmax"


def check_compact(before: dict[str, object], a: dict[str, object]) -> None:
    n = int(a["count"])
    assert n == int(before["keep"].sum()), "count"
    mine = [t.clone() for t in before["tensors"]]
    compact_op(mine[0], before["keep"], *mine[1:], backend="torch")
    for got, expected in zip(a["tensors"], mine, strict=True):
        assert torch.equal(got[:n], expected[:n]), "rows"


def check_end_exit(before: dict[str, object], a: dict[str, object]) -> None:
    entering = before["entering"]
    images = len(before["leave"]) if entering is None else int(entering)
    packed = {name: before[name][:images].clone() for name in ("tokens", "rows", "state")}
    answer = [part.clone() for part in before["answer"]]
    step = ExitStep(*(before[name][:images] for name in ("logits", "leave", "valid")))
    place = {"index": before["index"], "layer": before["layer"]}
    n = end_exit_op(step, **packed, answer=answer, **place, backend="torch")
    assert all(int(count) == n for count in a["counts"]), "counts"
    for got, expected in zip(a["answer"], answer, strict=True):
        assert torch.equal(got, expected), "answer"
    got = a | ({} if a["into"] is None else {"tokens": a["into"]})
    for name, expected in packed.items():
        assert torch.equal(got[name][:n], expected[:n]), name


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) else value


def compare(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape, (
        f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    if not got.numel():
        return
    assert torch.equal(got.isnan(), expected.isnan()), "NaN where the reference has none"
    error = (
        got.double() - expected
    ).abs().nan_to_num().max() / expected.abs().nan_to_num().max().clamp(min=1)
    assert error <= TOLERANCE[dtype], f"error {float(error):.1e}"


OPS = {
    "lph_pool_cpp": (lph, check_lph),
    "gah_pool_cpp": (gah, check_gah),
    "exit_step_cpp": (step, check_step),
    "compact_": (compaction, None),
    "end_exit_": (end_exit, None),
}
IN_PLACE = {"compact_": check_compact, "end_exit_": check_end_exit}


def _copy(value: object) -> object:
    if isinstance(value, list):
        return [t.clone() for t in value]
    return value.clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def run_case(number: int, seed: int) -> str:
    """Runs one case; "value" or "refused". Raises AssertionError on a failure."""
    draw = Draw(seed * 1_000_003 + number)
    name = draw.random.choice(list(OPS))
    make, check = OPS[name]
    arguments = make(draw)
    spoiled = draw.spoil(arguments) if draw.random.random() < 0.5 else None
    before = None
    if name in IN_PLACE and spoiled is None:
        before = {key: _copy(value) for key, value in arguments.items()}
    try:
        got = getattr(torch.ops.lgvit_fast, name)(**arguments)
    except REFUSALS as error:
        if spoiled is None:
            raise AssertionError(f"{name} refused what fits: {error}") from error
        return "refused"
    try:
        if check is not None:
            check(arguments, got)
        elif before is not None:
            IN_PLACE[name](before, arguments)
    except AssertionError as error:
        raise AssertionError(f"{name}, spoiled {spoiled}: {error}") from None
    return "value"


def child(first: int, last: int, seed: int, progress: Path) -> None:
    """Runs cases [first, last), writing each number before it; negative ones are the table's."""
    torch.set_num_threads(2)
    table = list(hostile_cases().items())
    counts = dict.fromkeys(("value", "refused", "failed"), 0)
    for number in range(first, last):
        progress.write_text(str(number))
        try:
            if number < 0:
                label, call = table[number + len(table)]
                try:
                    with torch.no_grad():
                        call()
                except REFUSALS:
                    outcome = "refused"
                else:
                    raise AssertionError(f"{label} was carried out")
            else:
                outcome = run_case(number, seed)
        except AssertionError as error:
            outcome = "failed"
            print(f"case {number}: {error}", flush=True)
        counts[outcome] += 1
    print("counts", *counts.values(), flush=True)


def run(count: int, seed: int) -> dict[str, int]:
    """Make all hostile calls and `count` random ones, in child processes; `failures` is to be 0."""
    first, crashes, totals = -len(hostile_cases()), 0, [0, 0, 0]
    total = count - first
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder, "case")
        while first < count:
            numbers = map(str, (first, count, seed))
            command = [sys.executable, "-m", "tests.fuzz.ops_fuzz", "--child", *numbers]
            with subprocess.Popen(
                [*command, str(progress)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("counts"):
                        totals = [a + int(b) for a, b in zip(totals, line.split()[1:], strict=True)]
                    else:
                        print(line, end="", flush=True)
            if process.returncode == 0:
                break
            at = int(progress.read_text()) if progress.exists() else first
            print(f"case {at} ended the process ({process.returncode})", flush=True)
            crashes += 1
            first = at + 1
    returned, refused, failed = totals
    return {"cases": total, "returned": returned, "refused": refused, "failures": failed + crashes}


def main(cases: int = 2500, seed: int = 0) -> int:
    """Run the cases and print their counts; returns the exit code."""
    counts = run(cases, seed)
    print(f"seed {seed}:", ", ".join(f"{key} {value}" for key, value in counts.items()))
    return int(counts["failures"] > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*map(int, sys.argv[2:5]), Path(sys.argv[5]))
    else:
        sys.exit(main(*map(int, sys.argv[1:])))
