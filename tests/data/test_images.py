"""From a file to pixels: what is refused unopened, what is bad, and how each mode is converted."""

import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from lgvit_fast.data import ImageSource, InputSpec, eval_transform, open_dataset
from lgvit_fast.data.images import check_file, open_image, upright
from tests.fuzz import images_fuzz

SPEC = InputSpec(3, (16, 16), (0.5,) * 3, (0.25,) * 3)


def pixel(image, at=(0, 0)):
    return image.getpixel(at)


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.full((4, 4), 0x8080, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.array([[0, 65535], [300, 257]], np.uint16)), (0, 0, 0)),
        (Image.fromarray(np.full((4, 4), 40000, np.int32)), (156, 156, 156)),
        (Image.fromarray(np.array([[-5, 2**30]], np.int32)), (0, 0, 0)),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), (128, 128, 128)),
        (Image.fromarray(np.full((4, 4), 200, np.float32)), (200, 200, 200)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("LA", (4, 4), (100, 255)), (100, 100, 100)),
        (Image.new("LA", (4, 4), (100, 0)), (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGB", (4, 4), (1, 2, 3)).quantize(4), (1, 2, 3)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value[0]),
)
def test_modes(image, expected):
    seen = upright(image)
    assert seen.mode == "RGB"
    assert pixel(seen) == expected
    grey = upright(image, "L")
    assert grey.mode == "L"
    assert pixel(grey) == pixel(seen.convert("L"))


def test_a_16_bit_png_is_scaled_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = save(tmp_path / "deep.png", Image.fromarray(levels))
    np.testing.assert_allclose(np.asarray(open_image(path, "L")), levels / 257, atol=0.51)


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert pixel(open_image(save(tmp_path / "p.png", image, transparency=1))) == (255, 255, 255)


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, form, tmp_path):
    pixels = np.kron(np.array([[255, 0, 0], [128, 0, 64]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"x.{form}", Image.fromarray(pixels).convert("RGB"), exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    seen = open_image(path)
    assert np.array_equal(np.asarray(seen), expected)
    assert np.array_equal(np.asarray(upright(seen)), expected)
    assert seen.size == ((32, 48) if orientation > 4 else (48, 32))


@pytest.fixture
def odd_places(tmp_path):
    """Class folders whose `.png` files are no files, beside one image."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    save(folder / "0.png", Image.new("RGB", (8, 8)))
    os.mkfifo(folder / "1.png")
    (folder / "2.png").symlink_to(folder / "1.png")
    (folder / "3.png").symlink_to("/dev/zero")
    (tmp_path / "empty").mkdir()
    (folder / "4.png").symlink_to(tmp_path / "empty")
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket must be short
        try:
            bound.bind("5.png")
        finally:
            os.chdir(here)
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [("1", "a FIFO"), ("2", "a FIFO"), ("3", "a device"), ("4", "a folder"), ("5", "a socket")],
)
@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_unopened(odd_places, name, kind, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match=f"{kind}, expected an image file"):
        open_image(odd_places / f"{name}.png")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_sources_pass_over_what_is_no_file(odd_places, dataset):
    source = ImageSource(open_dataset(str(odd_places.parent), dataset), eval_transform(SPEC))
    batch = source.__getitems__([(0, position) for position in range(len(source))])
    assert len(batch.targets) == 1
    assert [os.path.basename(image.name) for image in batch.bad] == [f"{n}.png" for n in "1235"]
    assert all("expected an image file" in image.reason for image in batch.bad)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ZeroDivisionError, MemoryError])
def test_whatever_a_decoder_raises_is_a_bad_image(error, tmp_path, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(2):
        save(folder / f"{number}.png", Image.new("RGB", (8 + number, 8)))
    real = ImageFile.ImageFile.load

    def load(self):
        if self.size == (8, 8):
            raise error("broken")
        return real(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    source = ImageSource(open_dataset(str(tmp_path)), lambda image: torch.zeros(3, 16, 16))
    batch = source.__getitems__([(0, 0), (0, 1)])
    assert len(batch.targets) == 1
    assert batch.bad[0].reason.startswith(error.__name__)


@pytest.mark.timeout(60)
def test_bombs_are_refused(tmp_path, monkeypatch):
    thin = save(tmp_path / "thin.png", Image.new("1", (1, 65500)))
    with pytest.raises(ValueError, match="1 x 65500 pixels: one side is over 250 times"):
        open_image(thin)
    large = save(tmp_path / "large.png", Image.new("1", (4000, 1000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(Image.DecompressionBombError):
        open_image(large)
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(ValueError, match="a file of 2147483648 bytes"):
        check_file(tmp_path / "sparse.png")


def test_postscript_is_never_run(tmp_path):
    path = save(tmp_path / "page.eps", Image.new("RGB", (8, 8)))
    with pytest.raises(OSError, match="cannot identify"):
        open_image(path.rename(tmp_path / "page.png"))


def test_damaged_exif_data_leaves_the_pixels(tmp_path):
    path = save(
        tmp_path / "x.jpeg", Image.new("RGB", (8, 8), "white"), exif=b"Exif\0\0MM\0*nonsense"
    )
    assert pixel(open_image(path)) == (255, 255, 255)


def test_damaged_files_of_every_format():
    found = images_fuzz.run(250, seed=3)
    assert found["failures"] == 0
    assert found["read"] > 50 and found["bad"] > 50


def test_grey_levels_beyond_16_bits_that_are_all_the_same():
    image = Image.fromarray(np.full((4, 6), 70000, np.int32))
    assert np.asarray(upright(image)).max() == 0
