"""Making a model of what a file says, only if that is what the file holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

__all__ = ["build_fitting", "malformed"]

Model = TypeVar("Model", bound=nn.Module)

# Tables that a model computes for itself (Swin's masks, rotary embeddings) and no file holds.
_MOST_TABLES = 256 << 20  # bytes, beside as many as the weights have


@contextmanager
def malformed(source: object) -> Iterator[None]:
    """Make any error about a file's content a ValueError that names the file."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
    except Exception as error:
        raise ValueError(f"{source} is malformed: {type(error).__name__}: {error}") from error


def build_fitting(
    build: Callable[[], Model], check: Callable[[Model], None], source: object
) -> Model:
    """Make a model after a look at one without storage, so that wrong sizes take no memory.

    Args:
        build: makes it.
        check: raises ValueError unless the weights fit the model that it is given.
        source: what to call the file in an error.

    Raises:
        ValueError: the weights do not fit, or the model needs far more memory than they have.
    """
    with malformed(source):
        with torch.device("meta"):
            outline = build()
        check(outline)
        held = sum(tensor.nbytes for tensor in outline.state_dict().values())
        tables = sum(tensor.nbytes for tensor in outline.buffers())
        if tables > held + _MOST_TABLES:
            raise ValueError(
                f"{source} asks for tables of {tables} bytes beside {held} bytes of weights: a size in"
                " its configuration is wrong"
            )
        return build()
