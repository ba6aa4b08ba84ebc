"""Depthwise 3x3 with gelu: forward and gradients against autograd of the plain form."""

import pytest
import torch
from torch import Tensor

from lgvit_fast.ops.depthwise import depthwise_gelu, depthwise_gelu_reference
from tests.kernels.device import generator

ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(batch: int, grid: tuple[int, int], width: int, dtype: torch.dtype) -> list[Tensor]:
    g = generator(0)
    shapes = ((batch, grid[0] * grid[1], width), (width, 3, 3), (width,))
    tokens, weight, bias = (torch.randn(*shape, generator=g) for shape in shapes)
    vectors = torch.promote_types(dtype, torch.float32)
    return [tokens.to(dtype), (weight / 3).to(vectors), bias.to(vectors)]


def check(inputs: list[Tensor], grid: tuple[int, int]) -> None:
    tokens, weight, bias = (x.detach().requires_grad_() for x in inputs)
    out = depthwise_gelu(tokens, grid, weight, bias, backend="triton")
    gradient = torch.randn(out.shape, generator=generator(1)).to(out.dtype)
    found = (out, *torch.autograd.grad(out, (tokens, weight, bias), gradient))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plain = depthwise_gelu_reference(exact[0], grid, exact[1], exact[2])
    expected = (plain, *torch.autograd.grad(plain, exact, gradient.double()))
    for mine, reference, like in zip(found, expected, (tokens, *inputs), strict=True):
        assert mine.shape == reference.shape and mine.dtype == like.dtype
        assert (mine - reference).norm() <= ERROR[inputs[0].dtype] * reference.norm()


@pytest.mark.parametrize(
    ("batch", "grid", "width"),
    [(3, (1, 1), 64), (2, (13, 15), 96), (1, (14, 14), 64), (2, (3, 40), 64)],
    ids=["1 token", "13x15", "14x14", "3x40"],
)
def test_matches_autograd(batch: int, grid: tuple[int, int], width: int) -> None:
    check(make(batch, grid, width, torch.float32), grid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype) -> None:
    check(make(2, (5, 7), 96, dtype), (5, 7))


def test_strided_tokens() -> None:
    tokens, weight, bias = make(6, (4, 4), 128, torch.float32)
    check([tokens[::2, :, ::2], weight[:64], bias[:64]], (4, 4))


def test_no_images() -> None:
    tokens, weight, bias = make(0, (2, 2), 64, torch.float32)
    weight.requires_grad_()
    depthwise_gelu(tokens, (2, 2), weight, bias, backend="triton").sum().backward()
    assert weight.grad is not None and weight.grad.count_nonzero() == 0


def test_operator_registration() -> None:
    tokens, weight, bias = make(1, (3, 2), 32, torch.float32)
    for x in (tokens, tokens.transpose(0, 1).clone().transpose(0, 1)):
        arguments = (x.requires_grad_(), 3, 2, weight.requires_grad_(), bias.requires_grad_())
        torch.library.opcheck(torch.ops.lgvit_fast.depthwise_gelu.default, arguments)


def test_bad_arguments() -> None:
    tokens, weight, bias = make(1, (2, 3), 64, torch.float32)
    with pytest.raises(ValueError, match="tokens has shape"):
        depthwise_gelu(tokens, (2, 2), weight, bias)
    with pytest.raises(ValueError, match="weight has shape"):
        depthwise_gelu(tokens, (2, 3), weight[:, None], bias)
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        depthwise_gelu(tokens.double(), (2, 3), weight, bias, backend="triton")
