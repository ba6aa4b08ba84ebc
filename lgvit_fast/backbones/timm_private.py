"""Every name of timm that is not part of its public interface, in one place.

A test asks for each of them, so that a timm which has renamed one says which.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["add_positions", "note_arguments", "noted_arguments"]


def add_positions(model: nn.Module, patches: Tensor) -> Any:
    """Prefix tokens and position embeddings added to embedded patches; Eva gives rotary ones, too."""
    embed: Any = model._pos_embed
    return embed(patches)


def noted_arguments(model: nn.Module) -> dict[str, Any] | None:
    """The arguments that a model was made with; None where timm (before 1.0.31) did not note them."""
    noted: dict[str, Any] | None = getattr(model, "_model_args", None)
    return noted


def note_arguments(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Note them where timm did not."""
    if noted_arguments(model) is None:
        model._model_args = dict(arguments)  # type: ignore[assignment]
