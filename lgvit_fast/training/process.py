"""This process: where it computes, and its place among those of a torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import timm.utils
import torch

__all__ = ["Process"]


@dataclass(frozen=True)
class Process:
    """Where this process computes, and its place among those of a torchrun."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, device: str | None = None) -> Process:
        """Join the other processes if there are any.

        Args:
            device: None takes a GPU if there is one.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            local = timm.utils.distributed.world_info_from_env()[0]
            place = torch.device(device, local) if device == "cuda" else torch.device(device)
            return cls(place, rank, world_size)
        joined = timm.utils.distributed.init_distributed_device_so(device)
        return cls(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])

    @property
    def primary(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Say plainly that another process is gone, which shows as the failure of some exchange.

        Raises:
            ConnectionError: another process ended, or cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.distributed or not _is_of_an_exchange(error):
                raise
            raise ConnectionError(
                f"process {self.rank} of {self.world_size} has lost another process of this run,"
                " which has ended, with an error of its own or killed, or cannot be reached;"
                " resume=True goes on from the last checkpoint"
            ) from error


def _is_of_an_exchange(error: RuntimeError) -> bool:
    """NCCL's failures have a type of their own; gloo's say where in gloo they were raised."""
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)
