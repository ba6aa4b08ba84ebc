"""Rows of single operations: what the device reaches, moves of rows, exit heads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.devices import Gpu
from benchmarks.gpu_check.record import Known, Measured, Row, Skipped, ratio
from lgvit_fast import ops
from lgvit_fast.bench.heads import HEADS, exit_head
from lgvit_fast.clock import Spread
from lgvit_fast.exit_rules import ExitRule, ExitStep, RuleKind
from lgvit_fast.ops.end_exit import Counts, end_exit_
from lgvit_fast.ops.lph import LPHWeights, lph_pool, lph_pool_reference
from lgvit_fast.outputs import Inference

# Of an H200, where a row of rates has no value: bytes and operations a microsecond.
H200 = {"rates/copy": 4300.0, "rates/gemm bf16": 790.0}
FEWEST_US = 8.0  # what a move of few rows may take
COPY_SHARE = 0.8  # of the speed of a copy that a move of many rows shall reach
FLOOR_FACTOR = {"lph_full": 2.5, "lph_light": 2.5, "gah_2": 3.0}
OVER_EAGER = {"lph_full": 3.0, "lph_light": 3.0, "gah_2": 3.0}
OVER_COMPILED = {"lph_full": 1.5, "lph_light": 1.5}
POOLS = {"triton": "triton", "GEMM and tail": "cpp"}  # the ways to run a local head, as backends
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative to the largest logit
RULE = ExitRule(RuleKind.CONFIDENCE, 0.8)


def short(dtype: torch.dtype) -> str:
    """The dtype's name in rows."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def rates(gpu: Gpu) -> Iterator[Row]:
    """What a copy and the library's GEMM reach: the floors of other rows are made of these."""
    sizes = gpu.sizes

    def copying(_: Known) -> Measured:
        source = torch.zeros(sizes.copied // 2, dtype=torch.uint8, device=gpu.device)
        target = torch.empty_like(source)
        return _inverse(gpu.time(partial(target.copy_, source)), sizes.copied / 1e3)

    yield Row("rates/copy", "GB/s", copying)
    yield Row("rates/gemm bf16", "TFLOP/s", partial(_gemm, gpu, torch.bfloat16))


def moves(gpu: Gpu) -> Iterator[Row]:
    """Compaction and the end of an exit beside copies of as many bytes, and a gather of who stays.

    The first rows leave, so that as many survivors move as can at that share.
    """
    for batch in gpu.sizes.batches:
        if batch == 1:
            continue  # nothing can move
        for leaving in (10, 50, 90):
            leavers = min(batch - 1, max(1, round(batch * leaving / 100)))
            case = cache(partial(_Moves, gpu, batch, leavers))
            name = f"moves/batch {batch}/{leaving} % leave"
            for way in ("copy", "compact_", "end_exit_", "gather"):
                yield Row(f"{name}/{way}", "us", partial(_move, case, f"{name}/copy", way))


def heads(gpu: Gpu, batch: int, dtype: torch.dtype, *, compiled: bool) -> Iterator[Row]:
    """Each head, eager, compiled, and ours on each backend; what ours gives is checked first.

    Beside them a local head's two ways down to its pooled vectors, which ours picks from.
    """
    full = batch == gpu.sizes.batches[0] and dtype == torch.bfloat16  # what the targets are for
    for kind in HEADS:
        case = cache(partial(_Head, gpu, kind, batch, dtype))
        name = f"heads/{short(dtype)}/batch {batch}/{kind}"
        yield Row(f"{name}/eager", "us", partial(_plain, case, False))
        if compiled:
            yield Row(f"{name}/compiled", "us", partial(_plain, case, True))
        for backend in ("triton", "torch") if full else ():
            yield Row(f"{name}/{backend}", "us", partial(_fused, case, backend, None))
        for way in POOLS if kind.startswith("lph") else ():
            yield Row(f"{name}/pool, {way}", "us", partial(_pooled, case, way))
        factor = FLOOR_FACTOR.get(kind) if full else None
        yield Row(f"{name}/ours", "us", partial(_fused, case, "auto", factor))
        eager, fused = f"{name}/eager", f"{name}/ours"
        yield ratio(f"{fused} over eager", fused, eager, OVER_EAGER.get(kind) if full else None)
        if compiled:
            aim = OVER_COMPILED.get(kind) if full else None
            yield ratio(f"{fused} over compiled", fused, f"{name}/compiled", aim)


def float32_gemm(gpu: Gpu) -> Iterator[Row]:
    """The GEMM's rate in float32, at torch's own setting for its precision."""
    yield Row("rates/gemm fp32", "TFLOP/s", partial(_gemm, gpu, torch.float32))


def _gemm(gpu: Gpu, dtype: torch.dtype, _: Known) -> Measured:
    n = gpu.sizes.matrix
    matrix = torch.randn(n, n, device=gpu.device).to(dtype)
    out = torch.empty_like(matrix)
    return _inverse(gpu.time(partial(torch.mm, matrix, matrix, out=out)), 2 * n**3 / 1e6)


def _inverse(spread: Spread, work: float) -> Measured:
    """The rate at which so much work was done."""
    return Measured.of(Spread(work / spread.median, work / spread.high, work / spread.low))


class _Moves:
    """Token buffers of which the first `leaving` rows leave, one after the other."""

    def __init__(self, gpu: Gpu, batch: int, leaving: int) -> None:
        gpu.tidy()
        sizes, device = gpu.sizes, gpu.device
        self.gpu, self.batch = gpu, batch
        self.keep = torch.arange(batch, device=device) >= leaving
        self.survivors = batch - leaving
        self.moved = min(leaving, self.survivors)
        shape = (batch, 1 + sizes.grid[0] * sizes.grid[1], sizes.width)
        self.tokens = [
            torch.randn(shape, device=device).to(gpu.dtype) for _ in range(sizes.buffers)
        ]
        self.bytes = 2 * self.moved * self.tokens[0][0].numel() * self.tokens[0].itemsize
        self.index = torch.arange(batch, device=device)
        self.state = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.answer = Inference.blank(batch + 1, sizes.classes, gpu.dtype, device).tensors()
        logits = torch.zeros(batch, sizes.classes, dtype=gpu.dtype, device=device)
        self.step = ExitStep(logits, ~self.keep, torch.ones_like(self.keep))
        on_gpu = device.type == "cuda"
        self.told = torch.zeros(1, dtype=torch.int64, pin_memory=on_gpu)
        self.counts = Counts(
            torch.tensor([batch], device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            self.told if on_gpu else None,
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    def calls(self, way: str) -> list[Callable[[], Any]]:
        return [partial(getattr(self, way.rstrip("_")), tokens) for tokens in self.tokens]

    def copy(self, tokens: Tensor) -> None:
        tokens[: self.moved].copy_(tokens[-self.moved :])

    def gather(self, tokens: Tensor) -> Tensor:
        return tokens.index_select(0, self.index[-self.survivors :])

    def compact(self, tokens: Tensor) -> None:
        self.gpu.compact([tokens, self.index], self.keep, self.told)

    def end_exit(self, tokens: Tensor) -> None:
        end_exit_(self.step, tokens, self.index, self.state, self.answer, 0, 1, counts=self.counts)

    def check(self, way: str) -> None:
        """Who stays must lie in the first rows, each beside its own number."""
        tokens, places = self.tokens[0], torch.arange(self.batch, device=self.index.device)
        before = tokens.clone()
        self.index.copy_(places)
        self.calls(way)[0]()
        self.gpu.wait()
        count = int(self.told if way == "compact_" else self.counts.survivors)
        rows = self.index[:count].clone()
        self.index.copy_(places)
        right = count == self.survivors and torch.equal(rows.sort().values, places[self.keep])
        if not right or not torch.equal(tokens[:count], before[rows]):
            raise AssertionError("the first rows are not those that stay: it is not timed")


def _move(case: Callable[[], _Moves], copy: str, way: str, known: Known) -> Measured:
    made = case()
    if way.endswith("_"):
        made.check(way)
    spread = made.gpu.time(*made.calls(way))
    rate = known.get("rates/copy", H200["rates/copy"])
    target = None
    if way.endswith("_"):
        target = max(FEWEST_US, known[copy] / COPY_SHARE)
    facts = {"rows_moved": made.moved, "gb_s": made.bytes / spread.median / 1e3}
    floor = None if way == "gather" else made.bytes / rate / 1e3
    return Measured.of(spread, floor=floor, target=target, facts=facts)


class _Head:
    """A head and tokens for it."""

    def __init__(self, gpu: Gpu, kind: str, batch: int, dtype: torch.dtype) -> None:
        gpu.tidy()
        torch.manual_seed(0)
        self.gpu, self.dtype, self.grid = gpu, dtype, gpu.sizes.grid
        self.head = exit_head(kind, dtype, gpu.device, gpu.sizes.width, gpu.sizes.classes)
        self.patches = self.grid[0] * self.grid[1]
        shape = (batch, 1 + self.patches, gpu.sizes.width)
        self.tokens = torch.randn(shape, device=gpu.device).to(dtype)
        self.state = torch.zeros(batch, 2, dtype=torch.int32, device=gpu.device)
        self.flops = _flops(kind, batch, self.grid, gpu.sizes.width)

    @torch.no_grad()
    def plain(self, compiled: bool) -> Spread:
        """Of the training form in plain PyTorch: none of this project's kernels."""
        call = self.head.forward
        if compiled:
            torch.compiler.reset()
            call = torch.compile(call, dynamic=False)
        with ops.backend("torch"):
            return self.gpu.time(lambda: call(self.tokens, self.grid)[0])

    @torch.no_grad()
    def fused(self, backend: str) -> tuple[Spread, float]:
        """Of the inference form, and how far its logits are from float64."""

        def call() -> Tensor:
            return self.head.step(self.tokens, self.grid, RULE, self.state).logits

        with ops.backend(self.gpu.backend(backend)):
            return self._checked(call, self.exact)

    @torch.no_grad()
    def pooled(self, way: str) -> tuple[Spread, float]:
        """Of one of `POOLS`, and how far its vectors are from float64."""
        none = torch.zeros(1, self.tokens.shape[2], dtype=torch.float64, device=self.gpu.device)
        weights = self.head.perception.fold(self.dtype, none)[0]
        backend = self.gpu.backend(POOLS[way])
        call = partial(lph_pool, self.tokens, self.grid, 1, weights, backend=backend)
        exact = lph_pool_reference(
            self.tokens.double(),
            self.grid,
            1,
            LPHWeights(*(None if w is None else w.double() for w in weights)),
        )
        return self._checked(call, exact)

    def _checked(self, call: Callable[[], Tensor], exact: Tensor) -> tuple[Spread, float]:
        try:
            with _poisoned_memory():
                found = call().double()
        except RuntimeError as error:
            if "cannot run" in str(error):
                raise Skipped(str(error)) from None
            raise
        error = float((found - exact).abs().max() / exact.abs().max())
        if not error <= TOLERANCE[self.dtype]:
            raise AssertionError(
                f"{error:.1e} from float64, allowed {TOLERANCE[self.dtype]:.0e}: it is not timed"
            )
        return self.gpu.time(call), error

    @cached_property
    def exact(self) -> Tensor:
        """The logits in float64."""
        with ops.backend("torch"):
            return copy.deepcopy(self.head).double()(self.tokens.double(), self.grid)[0]


def _plain(case: Callable[[], _Head], compiled: bool, _: Known) -> Measured:
    return Measured.of(case().plain(compiled))


def _pooled(case: Callable[[], _Head], way: str, known: Known) -> Measured:
    spread, error = case().pooled(way)
    return Measured.of(spread, facts={"error": error})


def _fused(case: Callable[[], _Head], backend: str, factor: float | None, known: Known) -> Measured:
    made = case()
    spread, error = made.fused(backend)
    name = f"rates/gemm {short(made.dtype)}"
    rate = known.get(name) or H200.get(name)
    floor = made.flops / rate / 1e6 if rate else None
    target = factor * floor if factor and floor else None
    return Measured.of(spread, floor=floor, target=target, facts={"error": error})


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, so that a value nobody wrote shows in the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `torch.empty` gives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _flops(kind: str, batch: int, grid: tuple[int, int], width: int) -> float:
    """Of the full GEMMs that the exact inference form cannot avoid."""
    if kind.startswith("lph"):
        return 2.0 * batch * grid[0] * grid[1] * width**2
    stride = int(kind.removeprefix("gah_"))
    return 4.0 * batch * -(-grid[0] // stride) * -(-grid[1] // stride) * width**2
