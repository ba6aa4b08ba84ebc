"""Images on their way into a model: sources, transforms, batches."""

from lgvit_fast.data.batches import BadImage, BadImageError, Batch, Batches, Key, Loader, Source
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
