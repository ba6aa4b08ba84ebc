"""Attention on a fused projection: forward and gradient against autograd of the plain form."""

import pytest
import torch
from torch import Tensor

from lgvit_fast.ops.attention import attention, attention_reference
from tests.kernels.device import generator

ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(0)).to(dtype)


def check(inputs: Tensor, num_heads: int) -> None:
    qkv = inputs.detach().requires_grad_()
    out = attention(qkv, num_heads, backend="triton")
    gradient = torch.randn(out.shape, generator=generator(1)).to(out.dtype)
    exact = inputs.detach().double().requires_grad_()
    plain = attention_reference(exact, num_heads)
    pairs = [(out, plain)]
    found = torch.autograd.grad(out, qkv, gradient)[0]
    expected = torch.autograd.grad(plain, exact, gradient.double())[0]
    pairs += zip(found.chunk(3, -1), expected.chunk(3, -1), strict=True)
    assert out.dtype == found.dtype == inputs.dtype
    scale = expected.norm()
    for mine, reference in pairs:
        assert mine.shape == reference.shape
        assert (mine - reference).norm() <= ERROR[inputs.dtype] * scale


@pytest.mark.parametrize(
    ("batch", "count", "width", "heads"),
    [(3, 1, 64, 2), (1, 49, 192, 2), (1, 25, 96, 4), (1, 117, 64, 2)],
    ids=["1 token", "49", "25", "more than a tile"],
)
def test_matches_autograd(batch: int, count: int, width: int, heads: int) -> None:
    check(make(batch, count, 3 * width), heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype) -> None:
    check(make(1, 70, 3 * 64, dtype=dtype), 2)


def test_strided_input() -> None:
    check(make(6, 9, 2 * 192)[::2, :, ::2], 2)


def test_large_scores_do_not_overflow() -> None:
    qkv = (40 * make(1, 20, 192)).requires_grad_()
    out = attention(qkv, 2, backend="triton")
    (found,) = torch.autograd.grad(out.sum(), qkv)
    assert out.isfinite().all() and found.isfinite().all()


def test_no_images() -> None:
    qkv = make(0, 9, 192).requires_grad_()
    attention(qkv, 2, backend="triton").sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape


def test_operator_registration() -> None:
    qkv = make(1, 5, 96)
    for x in (qkv, qkv.transpose(0, 1).clone().transpose(0, 1)):
        torch.library.opcheck(
            torch.ops.lgvit_fast.attention.default, (x.requires_grad_(), 2), rtol=1e-4, atol=1e-5
        )


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="qkv has shape"):
        attention(make(1, 4, 100), 2)
    with pytest.raises(RuntimeError, match="at most 128 channels"):
        attention(make(1, 4, 3 * 256), 1, backend="triton")
