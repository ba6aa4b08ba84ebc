"""The autograd kernels of `compact_` in Python, for a torch that csrc/dispatch.cpp was not built for.

torch's stable ABI has no way to pass a call on to the next dispatch key, none to ask whether a tensor
requires a gradient, and none to bump a version counter. A call costs some 20 microseconds more here
than with the compiled kernels. The private names of torch that this takes stand in this file alone.
"""

import torch
from torch import Tensor

_library = torch.library.Library("lgvit_fast", "IMPL")  # what is registered lives as long as this


def register() -> None:
    """Registers them; once in a process, and only where the compiled ones are not."""
    op = torch.ops.lgvit_fast.compact_.default

    def refuse_gradients(
        keys: torch._C.DispatchKeySet, tensors: list[Tensor], keep: Tensor, count: Tensor
    ) -> None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, keep, count)):
            raise RuntimeError(
                "lgvit_fast::compact_ has no gradient, and a tensor requires one: call it under"
                " torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            op.redispatch(keys & torch._C._after_autograd_keyset, tensors, keep, count)

    def bump_versions(
        keys: torch._C.DispatchKeySet, tensors: list[Tensor], keep: Tensor, count: Tensor
    ) -> None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, tensors, keep, count)
        torch.autograd.graph.increment_version(
            [t for t in (*tensors, count) if not t.is_inference()]
        )

    _library.impl("compact_", refuse_gradients, "Autograd", with_keyset=True)
    _library.impl("compact_", bump_versions, "ADInplaceOrView", with_keyset=True)
