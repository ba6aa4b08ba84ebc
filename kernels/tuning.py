"""Which configuration a kernel runs with, measured once for each device, key and size."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.testing

__all__ = ["INTERPRETED", "Device", "Tuned", "autotune", "fitting", "size_class"]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run on the CPU (``TRITON_INTERPRET=1`` was set before the first import)."""


class Device(NamedTuple):
    """What a candidate must fit.

    Attributes:
        shared: bytes of shared memory that a program can have.
        arch: compute capability, as 90.
    """

    shared: int
    arch: int


Fits = Callable[[triton.Config, dict[str, Any], Device], bool]
"""Whether a candidate runs well, given the call's arguments and the device."""

_measure = partial(triton.testing.do_bench, warmup=5, rep=20)  # milliseconds of a candidate


def size_class(rows: int) -> int:
    """Numbers of rows that are tuned alike: up to 4, 16, 64, ...

    A kernel takes it as an argument that it does not use, so that it can stand in the key.
    """
    return (max(0, rows - 1).bit_length() + 1) // 2


def autotune(configs: list[triton.Config], key: list[str], fits: Fits | None = None) -> Any:
    """A decorator of kernels that are tuned, see `Tuned`."""
    return lambda kernel: Tuned(kernel, configs, key, fits)


class Tuned(triton.KernelInterface[Any]):
    """A kernel that runs with the fastest of its candidates.

    The first call of a kind measures them, and Triton keeps the result on disk. While a CUDA graph is
    captured, which no measurement may disturb, and under the interpreter, what was not measured before
    runs with the first candidate that fits.

    Args:
        fn: the kernel, as `triton.jit` gives it.
        configs: candidates, the best guess first and the smallest last.
        key: names of the arguments whose change asks for a new choice, beside device and dtypes.
        fits: which candidates to try; by default all.
    """

    def __init__(
        self, fn: Any, configs: list[triton.Config], key: list[str], fits: Fits | None = None
    ) -> None:
        self.fn, self.configs, self.key, self.fits = fn, configs, key, fits
        self.chosen: dict[tuple[Any, ...], triton.Config] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Launch; `kernel[grid](...)` comes here."""
        config = self.configs[0] if INTERPRETED else self._choose(args, kwargs)
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> triton.Config:
        device = torch.cuda.current_device()
        named = dict(zip(self.fn.arg_names, args, strict=False)) | kwargs
        dtypes = (value.dtype for value in args if isinstance(value, torch.Tensor))
        key = (device, *(named[name] for name in self.key), *dtypes)
        if key not in self.chosen:
            candidates = fitting(self.configs, self.fits, device_at(device), named)
            if torch.cuda.is_current_stream_capturing():
                return candidates[0]
            tuner = triton.autotune(candidates, self.key, do_bench=_measure, cache_results=True)
            tuner = tuner(self.fn)
            tuner.run(*args, **kwargs)
            self.chosen[key] = tuner.best_config
        return self.chosen[key]


def device_at(index: int) -> Device:
    """The CUDA device of that index."""
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Device(properties["max_shared_mem"], 10 * major + minor)


def fitting(
    candidates: list[Any], fits: Fits | None, device: Device, args: dict[str, Any]
) -> list[Any]:
    """The candidates that fit; the last where none does."""
    if fits is None:
        return candidates
    return [c for c in candidates if fits(c, args, device)] or candidates[-1:]
