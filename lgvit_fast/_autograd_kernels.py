"""The autograd kernels of the operators of csrc/stable in Python.

For a torch that csrc/dispatch.cpp was not built for: torch's stable ABI has no way to pass a call on to
the next dispatch key, none to ask whether a tensor requires a gradient, and none to bump a version
counter. A call costs some 20 microseconds more here than with the compiled kernels. The private names
of torch that this takes stand in this file alone.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("lgvit_fast", "IMPL")  # what is registered lives as long as this


def register() -> None:
    """Registers them; once in a process, and only where the compiled ones are not."""
    for name in ("compact_", "end_exit_", "lph_tail"):
        _register(getattr(torch.ops.lgvit_fast, name).default)


def _register(op: torch._ops.OpOverload) -> None:
    names = [argument.name for argument in op._schema.arguments]
    written = {
        argument.name
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }

    def refuse_gradients(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(arguments)):
            raise RuntimeError(
                f"{op.name().split('.')[0]} has no gradient, and a tensor requires one: call it under"
                " torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    def bump_versions(keys: torch._C.DispatchKeySet, *arguments: Any) -> None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)
        changed = [value for name, value in zip(names, arguments, strict=False) if name in written]
        torch.autograd.graph.increment_version(
            [tensor for tensor in _tensors(changed) if not tensor.is_inference()]
        )

    name = op.name().split("::")[1].split(".")[0]
    _library.impl(name, refuse_gradients, "Autograd", with_keyset=True)
    if written:
        _library.impl(name, bump_versions, "ADInplaceOrView", with_keyset=True)


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments and in lists of these."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)
