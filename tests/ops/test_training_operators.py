"""The operators that heads train through, in plain PyTorch: their gradients and registration."""

import pytest
import torch
from torch import Tensor

from lgvit_fast.ops import attention, depthwise  # noqa: F401  registers them


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(dtype).requires_grad_()


def test_gradient_of_attention():
    operator = torch.ops.lgvit_fast.attention.default
    assert torch.autograd.gradcheck(lambda qkv: operator(qkv, 2)[0], (draw(2, 3, 12),))


def test_gradient_of_the_depthwise_step():
    operator = torch.ops.lgvit_fast.depthwise_gelu.default
    inputs = (draw(2, 6, 3), draw(3, 3, 3), draw(3))
    assert torch.autograd.gradcheck(lambda x, w, b: operator(x, 3, 2, w, b), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_registration(dtype):
    qkv, tokens = draw(1, 5, 96, dtype=dtype), draw(1, 6, 32, dtype=dtype)
    weight, bias = draw(32, 3, 3, dtype=dtype), draw(32, dtype=dtype)
    for view in (lambda x: x, lambda x: x.transpose(0, 1).clone().transpose(0, 1)):
        x = view(qkv.detach()).requires_grad_()
        torch.library.opcheck(torch.ops.lgvit_fast.attention.default, (x, 2), rtol=1e-4, atol=1e-5)
        x = view(tokens.detach()).requires_grad_()
        torch.library.opcheck(torch.ops.lgvit_fast.depthwise_gelu.default, (x, 3, 2, weight, bias))
