"""The CUDA kernels, run on the host: they equal the reference, whatever the order of their blocks.

`make sanitize` runs this file with the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import subprocess

import pytest
import torch

from lgvit_fast.exit_rules import ExitStep
from lgvit_fast.ops import compact_
from lgvit_fast.ops.end_exit import end_exit_
from lgvit_fast.ops.lph import LPHWeights, lph_pool_reference
from tests.cuda_host.build import FAULTS, build, compiler
from tests.cuda_host.kernels import ORDERS, HostKernels

SANITIZED = os.environ.get("LGVIT_SANITIZE", "")
BATCHES = [0, 1, 2, 31, 33, 255, 257, 1000, 8192]
ROW_BYTES = {16: 48, 8: 40, 4: 12, 2: 6, 1: 7}  # by the widest access they allow
LEAVING = {"none": 0.0, "some": 0.4, "all": 1.0}
GUARD = 0xA5  # what lies between and around rows

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on Linux")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return HostKernels(build(tmp_path_factory.mktemp("kernels"), sanitize=SANITIZED))


def by_name(values):
    return pytest.mark.parametrize(values[0], list(values[1].values()), ids=list(values[1]))


class Guarded:
    """Values as rows of a larger buffer: `gap` bytes between rows, `offset` before the first."""

    def __init__(self, values, gap=0, offset=0):
        size = values.itemsize
        gap, offset = gap // size, offset // size
        row = values.shape[1:].numel()
        count = offset + len(values) * (row + gap) + 64
        self._buffer = torch.full((count * size,), GUARD, dtype=torch.uint8)
        self._place = (values.shape, (row + gap, *torch.empty(values.shape[1:]).stride()), offset)
        self.rows = self._view(self._buffer, values.dtype)
        self.rows.copy_(values)
        self._before = self._buffer.clone()

    def check(self, expected):
        """The first rows are `expected`; not a byte beside them has changed."""
        assert torch.equal(self.rows[: len(expected)], expected)
        self.rows[: len(expected)] = self._view(self._before, expected.dtype)[: len(expected)]
        assert torch.equal(self._buffer, self._before)

    def _view(self, buffer, dtype):
        return buffer.view(dtype).as_strided(*self._place)


def random_bytes(generator, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


class Exit:
    """One call of end_exit_ on `batch` rows.

    Args:
        row, gap, offset: bytes of the tokens, which decide the width of the accesses.
        entering: None, or how many rows are said to hold images.
        into: None, or gap and offset of the buffer that the survivors' tokens go to.
        stray: rows whose place in the answer does not exist.
    """

    def __init__(
        self,
        batch,
        leaving=0.4,
        row=48,
        gap=0,
        offset=0,
        entering=None,
        into=None,
        classes=10,
        dtype=torch.float32,
        stray=(),
        seed=0,
    ):
        g = torch.Generator().manual_seed(seed)
        self.batch, self.answers = batch, batch + 5
        self.logits = Guarded((torch.randn(batch, classes, generator=g) * 50).to(dtype), 16)
        self.leave = Guarded(torch.rand(batch, generator=g) < leaving)
        self.valid = Guarded(torch.rand(batch, generator=g) < 0.8)
        self.tokens = Guarded(random_bytes(g, batch, row), gap, offset)
        self.state = Guarded(random_bytes(g, batch, 8), 8)
        rows = torch.randperm(self.answers, generator=g)[:batch]
        for i, place in enumerate(stray):
            rows[i * (batch // len(stray))] = place
        self.rows = Guarded(rows)
        self.answer = [
            Guarded((torch.ones(self.answers, classes) * 7).to(dtype), 16),
            Guarded(torch.full((self.answers,), -7)),
            Guarded(torch.full((self.answers,), -7)),
            Guarded(torch.zeros(self.answers, dtype=torch.bool)),
        ]
        self.entering = None if entering is None else torch.tensor([entering])
        self.images = batch if entering is None else min(max(entering, 0), batch)
        self.into = None
        if into is not None:
            self.into = Guarded(torch.full((batch + 2, row), 9, dtype=torch.uint8), *into)
        self.counts = [torch.tensor([-1]), torch.tensor([-1])]
        self.scratch = torch.zeros(1, dtype=torch.int32)

    def expect(self):
        """What the reference makes of it; a stray row is answered behind the answer."""
        e, m = self.images, self.answers
        answer = [torch.cat((part.rows, part.rows[:1])) for part in self.answer]
        rows = self.rows.rows[:e].clone()
        rows[(rows < 0) | (rows >= m)] = m
        tokens, state = self.tokens.rows[:e].clone(), self.state.rows[:e].clone()
        order = torch.arange(e)
        step = ExitStep(*(part.rows[:e] for part in (self.logits, self.leave, self.valid)))
        compact_(order, ~step.leave, backend="torch")
        n = end_exit_(step, tokens, rows, state, answer, 3, 8, backend="torch")
        moved = self.rows.rows[:e][order[:n]]
        return n, tokens[:n], moved, state[:n], [part[:m] for part in answer]

    def run(self, kernels, multiprocessors=2):
        kernels.end_exit(
            self.logits.rows,
            self.leave.rows,
            self.valid.rows,
            self.tokens.rows,
            None if self.into is None else self.into.rows,
            self.rows.rows,
            self.state.rows,
            [part.rows for part in self.answer],
            self.entering,
            self.counts,
            self.scratch,
            3,
            8,
            multiprocessors,
        )

    def check(self, kernels, multiprocessors=2):
        n, tokens, rows, state, answer = self.expect()
        self.run(kernels, multiprocessors)
        assert [int(count) for count in self.counts] == [n, n]
        assert int(self.scratch) == 0
        for part, expected in zip(self.answer, answer, strict=True):
            part.check(expected)
        (self.tokens if self.into is None else self.into).check(tokens)
        if self.into is not None:
            self.tokens.check(self.tokens.rows[:0])
        self.rows.check(rows)
        self.state.check(state)
        for read in (self.logits, self.leave, self.valid):
            read.check(read.rows[:0])


def check_compaction(kernels, tensors, keep, multiprocessors=2):
    expected = [guarded.rows.clone() for guarded in tensors]
    n = compact_(expected[0], keep, *expected[1:], backend="torch")
    count = torch.tensor([-1])
    kernels.compact([guarded.rows for guarded in tensors], keep, count, multiprocessors)
    assert int(count) == n
    for guarded, rows in zip(tensors, expected, strict=True):
        guarded.check(rows[:n])


def batch_of(size, leaving=0.4, seed=0):
    """Rows of every access width, next to each other and with gaps, and which to keep."""
    g = torch.Generator().manual_seed(seed)
    tensors = [Guarded(random_bytes(g, size, row)) for row in ROW_BYTES.values()]
    tensors += [
        Guarded(random_bytes(g, size, row), width, width) for width, row in ROW_BYTES.items()
    ]
    tensors += [Guarded(torch.arange(size)), Guarded(random_bytes(g, size, 0))]
    return tensors, torch.rand(size, generator=g) >= leaving


@by_name(("leaving", LEAVING))
@pytest.mark.parametrize("size", BATCHES)
def test_compaction_equals_the_reference(kernels, size, leaving):
    kernels.schedule("interleaved", seed=size)
    check_compaction(kernels, *batch_of(size, leaving, seed=size))


@by_name(("leaving", LEAVING))
@pytest.mark.parametrize("into", [None, (0, 0)], ids=["in place", "into"])
@pytest.mark.parametrize("batch", BATCHES)
def test_an_exit_equals_the_reference(kernels, batch, into, leaving):
    kernels.schedule("interleaved", seed=batch)
    Exit(batch, leaving, into=into, seed=batch).check(kernels)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_blocks_does_not_matter(kernels, order, multiprocessors):
    for seed in range(2):
        kernels.schedule(order, seed, resident=8)
        check_compaction(kernels, *batch_of(257, seed=seed), multiprocessors)
        Exit(300, seed=seed).check(kernels, multiprocessors)
        Exit(300, seed=seed, into=(0, 0)).check(kernels, multiprocessors)


def test_rows_longer_than_a_tile(kernels):
    kernels.schedule("interleaved")
    Exit(9, row=16 * 1024 + 16).check(kernels)
    Exit(9, row=1025, into=(0, 0)).check(kernels, 1)
    Exit(64, row=3 * 256 * 4 + 1, gap=2).check(kernels, 16)


@pytest.mark.parametrize("into", [None, "same", "narrow"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@by_name(("width", {str(width): width for width in ROW_BYTES}))
def test_every_width_of_access(kernels, width, strided, into):
    kernels.schedule("shuffled", seed=width)
    gap, offset = (width, 3 * width) if strided else (0, 0)
    place = {None: None, "same": (gap, offset), "narrow": (1, 1)}[into]
    Exit(70, row=ROW_BYTES[width], gap=gap, offset=offset, into=place).check(kernels)


@pytest.mark.parametrize("classes", [0, 1, 2, 5, 7, 32, 1000, 1001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_logits_of_every_width(kernels, dtype, classes):
    kernels.schedule("shuffled", seed=classes)
    Exit(21, classes=classes, dtype=dtype).check(kernels)


@pytest.mark.parametrize("entering", [-(2**40), -1, 0, 1, 32, 99, 100, 101, 2**31, 2**40])
@pytest.mark.parametrize("into", [None, (0, 0)], ids=["in place", "into"])
def test_padding_is_neither_answered_nor_moved(kernels, entering, into):
    kernels.schedule("interleaved", seed=1)
    Exit(100, entering=entering, into=into).check(kernels)


def test_rows_that_do_not_exist_are_not_answered(kernels):
    kernels.schedule("shuffled")
    stray = (-1, 105, 2**31, -(2**31), 2**32, 2**62, -(2**63))
    Exit(100, leaving=1.0, stray=stray).check(kernels)
    Exit(100, leaving=0.3, stray=stray, into=(0, 0)).check(kernels)


def test_flags_of_any_byte_and_any_stride(kernels):
    kernels.schedule("forward")
    tensors, _ = batch_of(33)
    wide = torch.tensor([0, 7, 2, 7, 255, 7, 1, 7], dtype=torch.uint8).view(torch.bool).repeat(9)
    check_compaction(kernels, tensors, wide[::2][:33])
    tensors, _ = batch_of(33)
    check_compaction(kernels, tensors, torch.ones(1, dtype=torch.bool).expand(33))


def test_one_count_or_none(kernels):
    for counts in ([], [torch.tensor([-1])]):
        case = Exit(40)
        n = case.expect()[0]
        case.counts = counts
        case.run(kernels)
        assert [int(count) for count in counts] == [n] * len(counts)


PHI_ERROR = 1.7e-4  # of the gelu for 16-bit types
TAIL_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2e-4, torch.float16: 2e-4}


class Tail:
    """One call of lph_tail: what follows a local head's GEMM, whose result is drawn here.

    Args:
        gap: channels between tokens, of which `offset` lie before them.
    """

    def __init__(self, grid, width, *, full=True, dtype=torch.float32, batch=2, gap=0, offset=0):
        g = torch.Generator().manual_seed(grid[0] * 100 + grid[1])

        def normal(*shape):
            return torch.randn(shape, generator=g)

        def guarded():
            rows = torch.full((batch, grid[0] * grid[1] + 2, width + gap), 7e4).to(dtype)
            inner = rows[:, 1:-1, offset : offset + width]
            return inner.copy_(normal(*inner.shape) * 2)

        self.grid, self.hidden, self.tokens = grid, guarded(), guarded()
        vectors = [normal(width), 1 + normal(width), normal(width), normal(width, 3, 3) / 3]
        self.weights = LPHWeights(torch.eye(width), *(vectors if full else vectors[:1]))
        if full:
            self.weights = self.weights._replace(depthwise_bias=normal(width))

    def check(self, kernels, multiprocessors=1):
        batch, _, width = self.tokens.shape
        pooled = torch.full((batch + 1, 2, width), 7.0)
        place = pooled[:batch]
        kernels.lph_tail(self.hidden, self.tokens, self.grid, self.weights, place, multiprocessors)
        exact = LPHWeights(*(None if v is None else v.double() for v in self.weights))
        expected = lph_pool_reference(self.hidden.double(), self.grid, 0, exact)
        expected[:, 1] = self.tokens.double().mean(1)
        error = (place - expected).abs().max() / expected.abs().max()
        assert error <= TAIL_ERROR[self.tokens.dtype]
        assert (pooled[batch] == 7).all()


GRIDS = [(1, 1), (1, 9), (9, 1), (7, 7), (13, 5), (3, 14), (14, 14), (2, 16)]


@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_a_heads_tail_equals_the_reference(kernels, grid, full):
    kernels.schedule("shuffled", seed=grid[1])
    for width in (1, 66, 131):
        for multiprocessors in (
            1,
            132,
        ):  # one warp for 64 channels, or several
            Tail(grid, width, full=full).check(kernels, multiprocessors)


@pytest.mark.parametrize("full", [True, False], ids=["full", "light"])
@pytest.mark.parametrize("dtype", list(TAIL_ERROR), ids=str)
def test_a_heads_tail_of_every_dtype_and_alignment(kernels, dtype, full):
    kernels.schedule("interleaved")
    for gap, offset in ((0, 0), (2, 2), (2, 1), (1, 0)):
        Tail((4, 14), 66, full=full, dtype=dtype, gap=gap, offset=offset).check(kernels, 4)
        Tail((3, 9), 10, full=full, dtype=dtype, gap=gap, offset=offset).check(kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gelu_of_every_16_bit_number(kernels, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).float()
    found, exact = (x * kernels.half_phi(x)).double(), torch.nn.functional.gelu(x.double())
    assert torch.equal(found.isnan(), exact.isnan())
    infinite = exact.isinf()
    assert torch.equal(found[infinite], exact[infinite])
    x, found, exact = (part[exact.isfinite()] for part in (x, found, exact))
    error = (found - exact).abs()
    assert error.max() <= PHI_ERROR
    assert (error <= 2**-9 * exact.abs())[x > -1].all()  # less than bfloat16 rounds by


def test_a_nan_stays_in_its_channel(kernels):
    kernels.schedule("forward")
    case = Tail((3, 4), 10, dtype=torch.bfloat16)
    case.hidden[1, 5, 3] = float("nan")
    pooled = torch.zeros(2, 2, 10)
    kernels.lph_tail(case.hidden, case.tokens, case.grid, case.weights, pooled, 1)
    assert pooled.isnan().nonzero().tolist() == [[1, 0, 3]]


def wrong(kernels, order, case):
    kernels.schedule(order, seed=1, resident=8)
    try:
        case.check(kernels, multiprocessors=4)
    except AssertionError:
        return True
    return False


@pytest.mark.skipif(bool(SANITIZED), reason="a sanitizer would end the process")
@pytest.mark.parametrize(
    ("fault", "order", "case"),
    [
        ("rows move while others read them", "forward", {}),
        ("rows move while others read them", "interleaved", {}),
        ("answers written beyond the buffer", "reverse", {"stray": (305, 306), "leaving": 1.0}),
    ],
)
def test_a_fault_gives_a_wrong_result(kernels, fault, order, case):
    assert not wrong(kernels, order, Exit(300, **case))
    with kernels.fault(fault):
        assert wrong(kernels, order, Exit(300, **case))


@pytest.mark.skipif(bool(SANITIZED), reason="abandoned threads are no concern of a sanitizer")
def test_a_barrier_that_not_all_threads_reach_is_an_error(kernels):
    kernels.schedule("forward")
    with (
        kernels.fault("half of the threads miss a barrier"),
        pytest.raises(RuntimeError, match="wait at a barrier for ever"),
    ):
        Exit(300).run(kernels)
    Exit(300).check(kernels)


@pytest.mark.skipif(not SANITIZED, reason="no sanitizer")
def test_the_sanitizer_sees_an_access_beyond_a_buffer(kernels):
    kernels.schedule("forward")
    case = Exit(300, leaving=1.0, stray=(305 + 70,))
    child = os.fork()
    if not child:
        with kernels.fault("answers written beyond the buffer"):
            case.run(kernels)
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0


@pytest.fixture(scope="module")
def under_thread_sanitizer(tmp_path_factory):
    """Runs the kernels with one of the faults, or none; returns the exit code and what was said."""
    if SANITIZED:
        pytest.skip("runs without another sanitizer")
    folder = tmp_path_factory.mktemp("races")
    try:
        program = build(folder, "races.cpp", "thread")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no ThreadSanitizer: {error}")

    def run(fault=None):
        number = 0 if fault is None else 1 + list(FAULTS).index(fault)
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        # Names of functions and lines are for who must find a fault that nobody put in.
        environment["TSAN_OPTIONS"] = f"halt_on_error=1:symbolize={int(fault is None)}"
        command = [program, str(number)]
        for prefix in (
            [],
            ["setarch", "-R"],
        ):  # it needs addresses that randomness may not leave it
            done = subprocess.run(
                [*prefix, *command], capture_output=True, text=True, env=environment
            )
            if "unexpected memory mapping" not in done.stderr:
                break
        return done.returncode, done.stdout + done.stderr

    return run


def test_no_two_threads_race(under_thread_sanitizer):
    assert under_thread_sanitizer() == (0, "no race\n")


@pytest.mark.parametrize("fault", list(FAULTS)[:6])
def test_a_race_is_found(under_thread_sanitizer, fault):
    code, said = under_thread_sanitizer(fault)
    assert code != 0 and "WARNING: ThreadSanitizer: data race" in said
