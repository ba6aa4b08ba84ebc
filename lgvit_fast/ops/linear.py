"""Linear layers for inference on a CPU, on the fastest GEMM that torch has for this processor.

Torch's float32 `linear` calls MKL, which is slower than oneDNN on processors that are not Intel's,
and oneDNN is fastest with the weight in a blocked layout of its own. The choice is measured once for
each weight shape, dtype and number of threads (csrc/cpu/linear.cpp, where the heads' kernels make
the same choice); ``LGVIT_LINEAR`` overrides it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgvit_fast import _extension
from lgvit_fast.ops.checks import check_memory
from lgvit_fast.ops.dispatch import chosen_backend
from lgvit_fast.ops.torch_private import pack_linear_weight, packed_linear

__all__ = ["CANDIDATES", "Linear", "PackedLinear", "fastest", "inference_linear", "why_not"]

CANDIDATES = ("linear", "conv", "packed")
_logger = logging.getLogger("lgvit_fast")


@cache
def why_not(gemm: str, dtype: torch.dtype) -> str | None:
    """Why this processor and torch cannot run one of `CANDIDATES` in a dtype; None if they can.

    Only "packed" can be missing: oneDNN packs bfloat16 for processors with AVX-512 or AVX-NE-CONVERT.
    """
    if gemm != "packed":
        return None
    if not torch.backends.mkldnn.is_available():
        return "torch is built without oneDNN"
    try:
        with torch.inference_mode(False), torch.no_grad():
            ones = torch.ones(8, 8, dtype=dtype)
            packed = pack_linear_weight(ones)
            packed_linear(ones, packed, None, "none")
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN has no packed {dtype} product here: {str(error).splitlines()[0]}"
    return None


def fastest(n: int, k: int, dtype: torch.dtype) -> str:
    """The GEMM that a linear layer with weight `[n, k]` runs fastest on, one of `CANDIDATES`.

    "linear" is `F.linear`, "conv" `F.conv2d` with a 1x1 kernel on the channels-last view, "packed"
    oneDNN with a prepacked weight. It does not depend on the number of rows, so that an image's
    answer does not depend on its batch. The first call for a shape measures, some 20 ms for a
    768 x 768 weight. Without the compiled extension it is "linear", and where ``LGVIT_LINEAR`` asks for
    what cannot run here (see `why_not`).

    Raises:
        ValueError: ``LGVIT_LINEAR`` names none of the candidates, or the weight has no numbers.
    """
    if n < 1 or k < 1:
        raise ValueError(f"n={n}, k={k}: a weight has at least one row and one column")
    if _extension.why_missing(torch.device("cpu")) is not None:
        return "linear"
    choice: str = torch.ops.lgvit_fast.linear_choice(n, k, dtype)
    wanted = os.environ.get("LGVIT_LINEAR")
    if wanted and choice != wanted:
        _log_once(f"LGVIT_LINEAR={wanted} gives way to {choice}: {why_not(wanted, dtype)}")
    return choice


@cache
def _log_once(message: str) -> None:
    _logger.info(message)


Linear = Callable[[Tensor], Tensor]


def inference_linear(weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Linear:
    """`activation(x weight^T + bias)` for inference: packed where `PackedLinear` can be, else plain.

    Under `ops.backend("torch")` it is plain, and so can be traced and exported.

    Args:
        weight: `[N, K]`.
        bias: `[N]` of the same dtype, or None.
        activation: None, or "gelu" for the exact gelu.
    """
    packable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    if packable and chosen_backend() != "torch":
        return PackedLinear(weight, bias, activation)
    return partial(_plain, weight=weight, bias=bias, activation=activation)  # can be pickled


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if activation is None else F.gelu(out)


class PackedLinear(nn.Module):
    """`activation(x weight^T + bias)` without gradients, its weight in the layout of one GEMM.

    The packed weight replaces the plain one, it is not held beside it. It is a copy: it does not
    follow later changes of `weight`. `weight` and `state_dict` give the plain weight back; loading
    weights, training, and moving to another device are errors.

    Args:
        weight: `[N, K]`, on the CPU, float32 or bfloat16.
        bias: `[N]` of the same dtype, or None.
        activation: None, or "gelu" for the exact gelu, fused into the GEMM where that can be.
        gemm: one of `CANDIDATES`; None takes the `fastest`.

    Raises:
        ValueError: a tensor, activation or GEMM that does not fit, or a GEMM that cannot run here.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        gemm: str | None = None,
    ) -> None:
        super().__init__()
        self.training = False
        if weight.dim() != 2 or weight.device.type != "cpu" or weight.numel() == 0:
            raise ValueError(
                f"weight is {list(weight.shape)} on {weight.device}, expected [N, K] on cpu, not empty"
            )
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weight is {weight.dtype}, expected float32 or bfloat16")
        if bias is not None and (
            bias.shape != weight.shape[:1]
            or bias.dtype != weight.dtype
            or bias.device != weight.device
        ):
            raise ValueError(
                f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}, expected {weight.dtype}"
                f" [{weight.shape[0]}] on cpu"
            )
        check_memory("PackedLinear", weight=weight, bias=bias)
        if activation not in (None, "gelu"):
            raise ValueError(f"activation={activation!r}, expected None or 'gelu'")
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        if gemm is None:
            gemm = fastest(self.out_features, self.in_features, weight.dtype)
        if gemm not in CANDIDATES:
            raise ValueError(f"gemm={gemm!r}, expected one of {', '.join(CANDIDATES)}")
        reason = why_not(gemm, weight.dtype)
        if reason is not None:
            raise ValueError(f"gemm={gemm!r} cannot run: {reason}")
        self.gemm = gemm
        weight = weight.detach().contiguous()
        self._bias = None if bias is None else bias.detach()
        self._weight = pack_linear_weight(weight) if self.gemm == "packed" else weight

    @property
    def weight(self) -> Tensor:
        """The plain weight `[N, K]`; a copy where it is packed."""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`, of the weight's dtype.

        Raises:
            ValueError: `x` has another last dimension, dtype or device.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features or x.dtype != self._weight.dtype:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}, expected {self._weight.dtype}"
                f" [..., {self.in_features}]"
            )
        if x.device.type != "cpu":
            raise ValueError(f"x is on {x.device}, expected cpu")
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        if self.gemm == "packed":
            activation = self.activation or "none"
            return packed_linear(x, self._weight, self._bias, activation)
        if self.gemm == "conv":
            rows = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
            out = F.conv2d(rows, self._weight[:, :, None, None], self._bias)
            out = out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)
        else:
            out = F.linear(x, self._weight, self._bias)
        return out if self.activation is None else F.gelu(out)

    def train(self, mode: bool = True) -> PackedLinear:
        """Eval mode is the only one.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError("packed linear layers have no gradients: train before packing")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        got = fn(torch.empty(0, dtype=self._weight.dtype))
        if got.dtype != self._weight.dtype or got.device.type != "cpu":
            raise RuntimeError(
                f"packed linear layers stay {self._weight.dtype} on the CPU: convert before packing"
            )
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.weight
        if self._bias is not None:
            destination[prefix + "bias"] = self._bias

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        error_msgs.append(f"{prefix[:-1]} is packed for inference: load weights before packing")

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.weight, self._bias, self.activation, self.gemm)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self._bias is not None}, activation={self.activation}, gemm={self.gemm!r}"
        )


def _unpickled(
    weight: Tensor, bias: Tensor | None, activation: str | None, gemm: str
) -> PackedLinear:
    """The layer where it is loaded, which may be a processor that cannot run its GEMM."""
    here = gemm if why_not(gemm, weight.dtype) is None else None
    return PackedLinear(weight, bias, activation, here)
