"""compact_: survivors to the front, the fewest rows written, nothing else touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgvit_fast import _extension
from lgvit_fast.ops import backend, compact_

CPU = torch.device("cpu")
BACKENDS = ["torch"] if _extension.why_compact_missing(CPU) else ["torch", "cpp"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    torch.bool,
    torch.int8,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.complex128,
]
GUARD = 64  # bytes kept free of any tensor, before and after


class Rows:
    """A tensor `[batch, *shape]` inside a larger buffer of random bytes, to see every write.

    Args:
        batch: Number of rows.
        shape: Shape of a row.
        dtype: Any.
        gap: Elements between two rows that do not belong to the tensor.
        device: Where it lives.
        seed: Of the bytes.
    """

    def __init__(self, batch, shape, dtype, gap=0, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)
        stride = torch.Size(shape).numel() + gap
        size = (batch * stride + 1) * dtype.itemsize + 2 * GUARD
        high = 2 if dtype == torch.bool else 256
        content = torch.randint(high, (size,), dtype=torch.uint8, generator=generator)
        self.buffer = content.to(device)
        strides = torch.empty(shape, device="meta").stride()
        elements = self.buffer[: size // dtype.itemsize * dtype.itemsize].view(dtype)
        offset = GUARD // dtype.itemsize
        self.tensor = elements.as_strided((batch, *shape), (stride, *strides), offset)
        self.width = torch.Size(shape).numel() * dtype.itemsize
        self.stride = stride * dtype.itemsize
        self.before = self.bytes().clone()
        self.around = self._around()

    def bytes(self):
        """The rows as bytes `[batch, width]`, so that NaN equals itself."""
        batch = self.tensor.shape[0]
        return self.buffer.as_strided((batch, self.width), (self.stride, 1), GUARD)

    def _around(self):
        rest = self.buffer.clone()
        rest.as_strided(self.bytes().shape, self.bytes().stride(), GUARD).zero_()
        return rest

    def check(self, order, n):
        """`order` [n] is where the survivors came from; returns how many rows changed."""
        after = self.bytes()
        assert torch.equal(after[:n], self.before[order]), "pairing"
        assert torch.equal(self._around(), self.around), "wrote outside its rows"
        return int((after != self.before).any(1).sum())


def check_compact(keep, rows, name):
    """Compacts `rows` with an index beside them and checks everything that is promised."""
    batch = len(keep)
    index = torch.arange(batch, device=keep.device)
    given_keep = keep.clone()
    n = compact_(rows[0].tensor, keep, *[r.tensor for r in rows[1:]], index, backend=name)
    kept = given_keep.nonzero().flatten()
    assert n == len(kept)
    assert torch.equal(keep, given_keep), "keep is only read"
    order = index[:n]
    assert torch.equal(order.sort().values, kept), "survivors"
    moves = int(given_keep[n:].sum())
    assert int((index != torch.arange(batch, device=keep.device)).sum()) == moves
    for r in rows:
        assert r.check(order, n) <= moves, "rows written"
    return index


def skip_unless_runs(name, device):
    reason = _extension.why_compact_missing(torch.device(device))
    if name == "cpp" and reason:
        pytest.skip(reason)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["torch", "cpp"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 3, 257])
def test_compact(batch, share, name, device):
    skip_unless_runs(name, device)
    generator = torch.Generator().manual_seed(batch)
    keep = (torch.rand(batch, generator=generator) < share).to(device)
    tokens = Rows(batch, (5, 48), torch.float32, device=device)
    state = Rows(batch, (3,), torch.int64, gap=2, device=device)
    check_compact(keep, [tokens, state], name)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_compact_property(name, data):
    keep = torch.tensor(data.draw(st.lists(st.booleans(), max_size=40), "keep"), dtype=torch.bool)
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    rows = [
        Rows(
            len(keep),
            data.draw(shapes, "shape"),
            data.draw(st.sampled_from(DTYPES), "dtype"),
            gap=data.draw(st.integers(0, 3), "gap"),
            seed=i,
        )
        for i in range(data.draw(st.integers(1, 5), "tensors"))
    ]
    check_compact(keep, rows, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_dtype_and_strided_keep(name, dtype):
    keep = (torch.arange(66) % 3 > 0)[::2]
    check_compact(keep, [Rows(33, (7,), dtype, gap=1)], name)


@pytest.mark.parametrize("name", BACKENDS)
def test_long_rows_take_several_threads(name):
    keep = torch.arange(40) % 2 == 1
    check_compact(keep, [Rows(40, (33, 1000), torch.float32)], name)


def test_backends_agree_on_every_row():
    keep = torch.rand(257, generator=torch.Generator().manual_seed(0)) < 0.6
    order = [check_compact(keep, [Rows(257, (4,), torch.float32)], name) for name in BACKENDS]
    assert all(torch.equal(order[0], other) for other in order)


def test_stable_keeps_order():
    keep = torch.rand(257, generator=torch.Generator().manual_seed(0)) < 0.6
    tokens, index = torch.randn(257, 3, 2), torch.arange(257)
    expected = tokens[keep]
    n = compact_(tokens, keep, index, stable=True)
    assert torch.equal(tokens[:n], expected)
    assert torch.equal(index[:n], keep.nonzero().flatten())
    with pytest.raises(RuntimeError, match=r"keeps no order|extension"):
        compact_(tokens, keep, stable=True, backend="cpp")


def test_many_companions():
    keep = torch.arange(50) % 5 > 1
    check_compact(keep, [Rows(50, (i,), torch.int16, seed=i) for i in range(40)], None)


def test_gradient_flows_through_the_reference():
    leaf = torch.randn(4, 3, requires_grad=True)
    tokens = leaf * 1
    n = compact_(tokens, torch.tensor([False, True, False, True]))
    tokens[:n].sum().backward()
    assert torch.equal(leaf.grad.sum(1), torch.tensor([0.0, 3.0, 0.0, 3.0]))


def test_inference_mode_and_global_choice():
    with torch.inference_mode(), backend("triton"):
        tokens = torch.arange(4)
        assert compact_(tokens, torch.tensor([False, True, False, True])) == 2
        assert tokens[:2].sum() == 4


KEEP = torch.tensor([True, False, True, False])


@pytest.mark.parametrize(
    ("tensors", "keep", "message"),
    [
        ([torch.zeros(4, 2)], KEEP.long(), r"keep must be bool \[B\], got torch.int64"),
        ([torch.zeros(4, 2)], KEEP[:, None], r"keep must be bool \[B\], got .* \[4, 1\]"),
        ([torch.zeros(3, 2)], KEEP, r"tokens has shape \[3, 2\], expected \[4, ...\]"),
        ([torch.zeros(())], KEEP, r"tokens has shape \[\]"),
        ([torch.zeros(4), torch.zeros(5)], KEEP, r"companion 1 has shape \[5\]"),
        ([torch.zeros(4, device="meta")], KEEP, "tokens is on meta, keep on cpu"),
        ([torch.zeros(4, 2, 3).transpose(1, 2)], KEEP, "rows that are not contiguous"),
        ([torch.zeros(4, 6)[:, ::2]], KEEP, "rows that are not contiguous"),
        ([torch.zeros(1, 2).expand(4, 2)], KEEP, "tokens has rows that share memory"),
        ([torch.zeros(9).as_strided((4, 3), (2, 1))], KEEP, "tokens has rows that share memory"),
    ],
    ids=lambda value: None if isinstance(value, (list, torch.Tensor)) else value[:20],
)
def test_bad_input(tensors, keep, message):
    with pytest.raises(ValueError, match=message):
        compact_(tensors[0], keep, *tensors[1:])


def test_shared_memory_between_arguments():
    buffer = torch.zeros(4, 6)
    assert compact_(buffer[:, :3], KEEP, buffer[:, 3:]) == 2  # beside each other: fine
    with pytest.raises(ValueError, match="tokens and companion 1 share memory"):
        compact_(buffer[:, :4], KEEP, buffer[:, 3:])
    flags = KEEP.clone()
    with pytest.raises(ValueError, match="tokens and keep share memory"):
        compact_(flags, flags)


def test_bad_input_leaves_everything_as_it_was():
    tokens = torch.arange(4)
    with pytest.raises(ValueError, match="companion 1"):
        compact_(tokens, KEEP, torch.zeros(3))
    assert tokens.tolist() == [0, 1, 2, 3]


needs_extension = pytest.mark.skipif(
    _extension.why_compact_missing(CPU) is not None, reason=str(_extension.why_compact_missing(CPU))
)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64, 1000, 8192])
@pytest.mark.parametrize("width", [1, 3, 16, 20, 768 * 4, 50_001])
def test_cuda_kernel_agrees_with_reference(batch, width):
    skip_unless_runs("cpp", "cuda")
    width = min(width, 2**26 // batch)
    keep = torch.rand(batch, generator=torch.Generator().manual_seed(width)).cuda() < 0.7
    rows = [Rows(batch, (width,), torch.int8, gap=gap, device="cuda") for gap in (0, 12, 13)]
    order = check_compact(keep, rows, "cpp")
    assert torch.equal(
        order, check_compact(keep, [Rows(batch, (1,), torch.int8, 0, "cuda")], "torch")
    )


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_flags():
    skip_unless_runs("cpp", "cuda")
    tokens, keep = torch.zeros(64, 1000, device="cuda"), torch.ones(64, device="cuda").bool()
    count = torch.empty(1, dtype=torch.int64, pin_memory=True)
    torch.ops.lgvit_fast.compact_([tokens], keep, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.lgvit_fast.compact_([tokens], keep, count)
    for seed in range(3):
        flags = torch.rand(64, generator=torch.Generator().manual_seed(seed)) < 0.5
        keep.copy_(flags)
        tokens.copy_(torch.arange(64.0)[:, None].expand(64, 1000))
        graph.replay()
        torch.cuda.synchronize()
        n = int(count)
        assert n == flags.sum()
        assert sorted(tokens[:n, -1].tolist()) == flags.nonzero().flatten().tolist()


@pytest.mark.gpu
def test_cuda_uses_the_current_stream():
    skip_unless_runs("cpp", "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        keep = torch.arange(8, device="cuda") % 2 == 1
        tokens = torch.arange(8, device="cuda")
        assert compact_(tokens, keep, backend="cpp") == 4
        assert sorted(tokens[:4].tolist()) == [1, 3, 5, 7]


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "strided", "empty"])
def test_opcheck(layout):
    tokens = {
        "contiguous": torch.randn(5, 3),
        "strided": torch.randn(5, 7)[:, 2:5],
        "empty": torch.randn(0, 3),
    }[layout]
    keep = torch.tensor([False, True, False, True, True])[: len(tokens)]
    count = torch.empty(1, dtype=torch.int64)
    arguments = ([tokens, torch.arange(len(tokens))], keep, count)
    torch.library.opcheck(torch.ops.lgvit_fast.compact_.default, arguments)


@needs_extension
def test_operator_does_not_break_the_graph():
    torch._dynamo.reset()

    def step(tokens, keep):
        tokens = tokens * 2
        count = torch.empty(1, dtype=torch.int64)
        torch.ops.lgvit_fast.compact_([tokens], keep, count)
        return tokens + 1, count

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tokens, count = compiled(torch.arange(4.0), KEEP)
    assert count == 2
    assert tokens[:2].tolist() == [1.0, 5.0]


@needs_extension
@pytest.mark.parametrize(
    ("tensors", "keep", "count"),
    [
        ([torch.zeros(3)], KEEP, torch.zeros(1, dtype=torch.int64)),
        ([torch.zeros(4)], KEEP.long(), torch.zeros(1, dtype=torch.int64)),
        ([torch.zeros(4)], KEEP, torch.zeros(1)),
        ([torch.zeros(4, 6)[:, ::2]], KEEP, torch.zeros(1, dtype=torch.int64)),
        ([torch.zeros(1, 2).expand(4, 2)], KEEP, torch.zeros(1, dtype=torch.int64)),
    ],
    ids=["length", "keep dtype", "count dtype", "row stride", "expanded"],
)
def test_operator_checks_for_itself(tensors, keep, count):
    with pytest.raises(ValueError, match=r"got|overlap"):
        torch.ops.lgvit_fast.compact_(tensors, keep, count)
