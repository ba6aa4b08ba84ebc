"""Sources of images: order, augmentation, splits, and what happens to files that are no images."""

import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lgvit_fast.cli.predict import _files
from lgvit_fast.data.batches import Batches, Loader
from lgvit_fast.data.digits import Digits
from lgvit_fast.data.sources import ImageSource, class_names, open_dataset
from lgvit_fast.data.suffixes import IMAGE_SUFFIXES
from lgvit_fast.data.transforms import InputSpec, eval_transform
from lgvit_fast.training.config import TrainConfig
from lgvit_fast.training.datasets import Data

SPEC = InputSpec(3, (16, 16), (0.5,) * 3, (0.25,) * 3)
CLASSES = ("cat", "dog", "owl")


def write_images(folder, per_class=4):
    """Class folders of small random images."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


def keys(batches):
    return [key for batch in batches for key in batch]


# ------------------------------------------------------------------------------------- order


def test_training_order_is_a_function_of_seed_and_epoch():
    first, again = (Batches(20, 4, training=True, seed=5) for _ in range(2))
    first.epoch = again.epoch = 3
    assert list(first) == list(again)
    again.epoch = 4
    assert sorted(p for _, p in keys(first)) == sorted(p for _, p in keys(again)) == list(range(20))
    assert [p for _, p in keys(first)] != [p for _, p in keys(again)]


def test_an_epoch_can_start_in_its_middle():
    whole, rest = Batches(22, 4, training=True), Batches(22, 4, training=True)
    rest.start = 2
    assert list(whole)[2:] == list(rest)
    assert len(list(whole)) == len(whole) == 5  # full batches only


@pytest.mark.parametrize("length", [0, 1, 4, 9, 12])
def test_validation_takes_every_image_once_in_order(length):
    batches = Batches(length, 4, training=False)
    assert [position for _, position in keys(batches)] == list(range(length))
    assert len(list(batches)) == len(batches)


def test_fewer_images_than_a_batch_still_train():
    assert [len(batch) for batch in Batches(3, 8, training=True)] == [3]


def test_processes_share_a_global_batch():
    alone = Batches(24, 6, training=True, seed=1)
    parts = [Batches(24, 3, training=True, seed=1, rank=r, world_size=2) for r in range(2)]
    for together, *shares in zip(alone, *parts, strict=True):
        assert together == [key for share in shares for key in share]


# ------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_a_function_of_seed_epoch_and_image(folder, workers):
    config = TrainConfig(data=str(folder), seed=7, val_fraction=0.25)
    train, _ = Data.open(config).sources(SPEC)
    batches = Batches(len(train), 3, training=True, seed=7)
    order = keys(batches)
    state = torch.get_rng_state()
    images = torch.cat([batch.images for batch in Loader(train, batches, workers).epoch(0)])
    assert torch.equal(torch.get_rng_state(), state)  # loading leaves the global generator alone
    assert torch.equal(images, train.__getitems__(order).images)
    next_epoch = train.__getitems__([(1, position) for _, position in order]).images
    assert not torch.equal(images, next_epoch)


def test_a_held_out_part_is_disjoint_and_seeded(folder):
    config = TrainConfig(data=str(folder), val_fraction=0.25)
    train, val = Data.open(config).sources(SPEC)
    assert (len(train), len(val)) == (9, 3)
    assert sorted([*train.positions, *val.positions]) == list(range(12))
    again = Data.open(config).sources(SPEC)
    assert again[1].positions == val.positions


def test_validation_folders_are_found(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "val", 2)
    train, val = Data.open(TrainConfig(data=str(tmp_path))).sources(SPEC)
    assert (len(train), len(val)) == (9, 6)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
@pytest.mark.parametrize("capitals", [False, True], ids=["small", "capitals"])
def test_the_same_suffixes_everywhere(tmp_path, suffix, capitals):
    picture = Image.new("L", (16, 16), 99)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        kind = Image.registered_extensions()[suffix]
        file = tmp_path / "data" / name / f"x{suffix.upper() if capitals else suffix}"
        picture.save(file, format=kind)
    (tmp_path / "data" / "cat" / "notes.txt").write_text("no image")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "data", arcname=".")
    listed = timm.data.get_img_extensions()
    for place in ("data", "data.tar"):
        source = ImageSource(open_dataset(str(tmp_path / place)), eval_transform(SPEC))
        batch = source.__getitems__([(0, 0), (0, 1)])
        assert len(source) == len(batch.images) == 2
    assert len(list(_files([str(tmp_path / "data")]))) == 2  # what predict reads
    assert timm.data.get_img_extensions() == listed


def test_a_folder_of_other_splits_is_not_one_mixed_set(tmp_path):
    write_images(tmp_path / "photos" / "train", 2)
    write_images(tmp_path / "photos" / "test", 1)
    with pytest.raises(ValueError, match=r"holds test/ and train/.* the split 'validation'"):
        open_dataset(str(tmp_path / "photos"), split="validation")
    assert len(open_dataset(str(tmp_path / "photos"), split="test")) == 3
    assert len(open_dataset(str(tmp_path / "photos" / "test"), split="validation")) == 3
    # trains and tests can be classes, beside another
    write_images(tmp_path / "vehicles", 2)
    for name, instead in (("cat", "test"), ("dog", "train")):
        (tmp_path / "vehicles" / name).rename(tmp_path / "vehicles" / instead)
    found = open_dataset(str(tmp_path / "vehicles"), split="validation")
    assert class_names(found) == ["owl", "test", "train"]


def test_a_tar_of_class_folders(folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, arcname=".")
    config = TrainConfig(data=str(tmp_path / "images.tar"), val_data=str(folder))
    data = Data.open(config)
    assert data.class_names == list(CLASSES)
    train, val = data.sources(SPEC)
    assert (len(train), len(val)) == (12, 12)
    assert train.__getitems__([(0, 0), (0, 11)]).images.shape == (2, 3, 16, 16)


def test_one_channel_models_get_grey_images(folder):
    grey = InputSpec(1, (16, 16), (0.5,), (0.25,))
    train, val = Data.open(TrainConfig(data=str(folder))).sources(grey)
    assert train.__getitems__([(0, 0)]).images.shape == (1, 1, 16, 16)
    assert val.__getitems__([(0, 0)]).images.shape == (1, 1, 16, 16)


def test_unreadable_files_are_reported_by_name(folder):
    (folder / "cat" / "0.png").write_bytes(b"not an image")
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    _, val = Data.open(TrainConfig(data=str(folder), val_data=str(folder))).sources(SPEC)
    batch = val.__getitems__([(0, position) for position in range(len(val))])
    assert [image.name for image in batch.bad] == [
        str(folder / "cat" / "0.png"),
        str(folder / "dog" / "1.png"),
    ]
    assert len(batch.images) == len(batch.targets) == 10
    assert batch.targets.tolist() == [0] * 3 + [1] * 3 + [2] * 4


def test_wrong_places_get_a_plain_message(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data is '.*nowhere', which does not exist"):
        open_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"expected a folder or a \.tar"):
        open_dataset(str(folder / "cat" / "0.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        open_dataset(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"cannot open 'torch/cifar10'.*download=True"):
        open_dataset(str(tmp_path), "torch/cifar10")
    with pytest.raises(ValueError, match="cannot be resumed exactly"):
        open_dataset(str(tmp_path), "wds/anything")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(ImportError, match=r"'hfds/mnist' needs a package .*datasets"):
        open_dataset(str(tmp_path), "hfds/mnist")


def test_torchvision_datasets(folder):
    (folder / "dog" / "1.png").write_bytes(b"not an image")
    config = TrainConfig(data=str(folder), dataset="torch/image_folder", num_classes=3)
    data = Data.open(config)
    assert data.class_names == list(CLASSES)
    train, val = data.sources(SPEC)
    assert len(train) == len(val) == 12
    batch = val.__getitems__([(0, position) for position in range(12)])
    assert len(batch.images) == 11
    assert [image.name for image in batch.bad] == [str(folder / "dog" / "1.png")]


def test_classes_of_both_parts_must_agree(folder, tmp_path):
    write_images(tmp_path / "other")
    (tmp_path / "other" / "owl").rename(tmp_path / "other" / "fox")
    with pytest.raises(ValueError, match="differ in their classes: fox, owl"):
        Data.open(TrainConfig(data=str(folder), val_data=str(tmp_path / "other")))


# ------------------------------------------------------------------------------- input, digits


@pytest.mark.parametrize(
    ("kwargs", "channels", "size"),
    [
        ({"img_size": 32}, 3, (32, 32)),
        ({"img_size": (32, 48), "in_chans": 1}, 1, (32, 48)),
        ({}, 3, (224, 224)),
    ],
    ids=["small", "grey wide", "own"],
)
def test_input_spec_is_what_the_model_was_built_for(kwargs, channels, size):
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, **kwargs)
    spec = InputSpec.of(model)
    assert (spec.channels, spec.size) == (channels, size)
    assert len(spec.mean) == len(spec.std) == channels


def test_digits_split():
    train, val = Digits("train", SPEC), Digits("validation", SPEC)
    assert len(train) + len(val) == 1797
    assert len(val) == 359
    scans = {scan.numpy().tobytes() for scan in train.images}
    assert sum(scan.numpy().tobytes() in scans for scan in val.images) < 5  # a few equal scans
    assert torch.equal(Digits("validation", SPEC, seed=9).images, val.images)


def test_digits_are_augmented_per_image_and_epoch():
    source = Digits("train", SPEC, augment=True, seed=1)
    batch = source.__getitems__([(2, 10), (2, 11), (2, 12)])
    assert batch.images.shape == (3, 3, 16, 16)
    alone = source.__getitems__([(2, 11)])
    torch.testing.assert_close(alone.images[0], batch.images[1])
    assert not torch.allclose(alone.images, source.__getitems__([(3, 11)]).images)


def test_digits_without_augmentation_are_enlarged_scans():
    source = Digits("train", InputSpec(1, (8, 8), (0.0,), (1.0,)))
    torch.testing.assert_close(source.__getitems__([(0, 4)]).images[0], source.images[4])


def test_unknown_digits_split():
    with pytest.raises(ValueError, match="split is 'test', expected"):
        Digits("test", SPEC)
