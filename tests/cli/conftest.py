"""A saved model and image files for the command line to work on."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import tiny_model

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]


def save_image(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> None:
    """An image of noise."""
    pixels = torch.randint(
        0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder of a tiny model with random weights and class names."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(exits=4)
    model.class_names = CLASSES
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    """Five good images, a truncated JPEG and a text file that calls itself a PNG."""
    folder = tmp_path / "photos"
    for number in range(5):
        save_image(folder / "deep" / f"{number}.png", number)
    save_image(folder / "torn.jpg", 9)
    data = (folder / "torn.jpg").read_bytes()
    (folder / "torn.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not an image\n")
    (folder / "notes.txt").write_text("not meant as one\n")
    return folder
