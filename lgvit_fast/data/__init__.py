"""Images on their way into a model: sources, transforms, batches.

Names are imported when first used: `lgvit_fast.data.images` serves exported models, too, where torch is
not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lgvit_fast.data.batches import (
        BadImage,
        BadImageError,
        Batch,
        Batches,
        Key,
        Loader,
        Source,
    )
    from lgvit_fast.data.digits import Digits
    from lgvit_fast.data.images import open_image
    from lgvit_fast.data.sources import ImageSource, class_names, open_dataset
    from lgvit_fast.data.transforms import InputSpec, eval_transform

__all__ = [
    "BadImage",
    "BadImageError",
    "Batch",
    "Batches",
    "Digits",
    "ImageSource",
    "InputSpec",
    "Key",
    "Loader",
    "Source",
    "class_names",
    "eval_transform",
    "open_dataset",
    "open_image",
]

_HOME = {
    "batches": ("BadImage", "BadImageError", "Batch", "Batches", "Key", "Loader", "Source"),
    "digits": ("Digits",),
    "images": ("open_image",),
    "sources": ("ImageSource", "class_names", "open_dataset"),
    "transforms": ("InputSpec", "eval_transform"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
