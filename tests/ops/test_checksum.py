"""The checksum tells every change of a tensor's bytes."""

import pytest
import torch

from lgvit_fast.ops.checksum import checksum, device_checksum

FORMS = [checksum, lambda tensor: int(device_checksum(tensor))]
CHANGES = {
    "one number": lambda w: w[5].add_(0.01),
    "one sign": lambda w: w[7, :1].neg_(),
    "every sign": lambda w: w.neg_(),
    "doubled": lambda w: w.mul_(2),
    "two rows swapped": lambda w: w[[1, 2]].clone().unbind() and w[1:3].copy_(w[1:3].flip(0)),
    "two signs": lambda w: w[::64, 0].neg_(),
    "the last number": lambda w: w[-1, -1:].add_(1e-6),
    "a shift": lambda w: w.copy_(w.roll(1, 0)),
}


@pytest.mark.parametrize("form", FORMS, ids=["used", "plain"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(768, 768), (129, 3)], ids=str)
def test_a_change_is_told(shape, change, form):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).add_(0.5)
    before = form(weight)
    assert form(weight) == before == form(weight.clone())
    CHANGES[change](weight)
    assert form(weight) != before


@pytest.mark.parametrize("form", FORMS, ids=["used", "plain"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.int64], ids=str)
def test_every_dtype_length_and_layout(dtype, form):
    for shape in ((0,), (), (1,), (3,), (5, 7)):
        tensor = torch.zeros(shape, dtype=dtype)
        before = form(tensor)
        tensor.fill_(1)
        assert form(tensor) != before or not tensor.numel()
    tensor = torch.arange(35).view(5, 7).to(dtype).t()
    assert form(tensor) == form(tensor.contiguous())
