"""Preprocessing without torch is timm's evaluation transform."""

import numpy as np
import pytest
from PIL import Image

from lgvit_fast.data.images import upright
from lgvit_fast.data.transforms import InputSpec, eval_transform
from lgvit_fast.deploy.preprocess import INTERPOLATIONS, Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def both(image, size, crop_pct, interpolation="bicubic", mean=MEAN, std=STD):
    """What timm makes of an image, and what we do; both in grey levels."""
    facts = (len(mean), size, mean, std, interpolation, crop_pct)
    mode = "L" if len(mean) == 1 else "RGB"
    expected = eval_transform(InputSpec(*facts))(upright(image, mode)).numpy()
    got = Preprocessing(*facts)(image)
    assert got.dtype == np.float32 and got.shape == expected.shape == (len(mean), *size)
    scale = np.array(std, np.float32)[:, None, None] * 255
    return expected * scale, got * scale


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (24, 40), (33, 17)], ids=str)
@pytest.mark.parametrize("given", [(300, 200), (200, 301), (97, 97), (31, 32), (5, 400)], ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_equals_timm(given, size, crop_pct):
    expected, got = both(picture(*given), size, crop_pct)
    assert np.abs(got - expected).max() < 0.01  # grey levels


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation(interpolation):
    expected, got = both(picture(70, 50), (32, 32), 0.9, interpolation)
    assert np.abs(got - expected).max() < 0.01


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode(mode, channels):
    mean, std = MEAN[:channels], STD[:channels]
    expected, got = both(picture(50, 40, mode), (32, 32), 1.0, mean=mean, std=std)
    assert np.abs(got - expected).max() < 0.01


def test_reads_a_file(tmp_path):
    picture(40, 30).save(tmp_path / "a.png")
    spec = Preprocessing(3, (16, 16), MEAN, STD, "bilinear", 1.0)
    assert np.array_equal(spec.read(tmp_path / "a.png"), spec(picture(40, 30)))


def test_other_channels_have_no_files():
    spec = Preprocessing(4, (16, 16), (0.5,) * 4, (0.5,) * 4, "bicubic", 1.0)
    with pytest.raises(ValueError, match="wants 4 channels"):
        spec(picture(16, 16))
