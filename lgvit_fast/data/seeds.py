"""Randomness without history: every random draw of training is a function of what it is for.

A sample's augmentation depends on (seed, epoch, index) and an update's dropout and Mixup on (seed,
stage, update, micro-batch, rank). So a resumed run needs no generator state, and the number of
loader workers changes nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key` and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator seeded by `key`."""
    return torch.Generator().manual_seed(derive_seed(*key))


def seed_all(*key: int | str) -> None:
    """Seed Python, NumPy and torch (every device) by `key`."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed Python, NumPy and torch's CPU generator by `key` inside the block; restore them after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
