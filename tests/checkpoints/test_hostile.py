"""Files from strangers: they run no code, open nothing, and take no more memory than they hold."""

import inspect
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from packaging.requirements import Requirement
from PIL import Image
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

import lgvit_fast
from lgvit_fast.backbones.timm_arguments import ARGUMENTS
from lgvit_fast.backbones.timm_models import describe_backbone
from lgvit_fast.checkpoints import export_published, files, load_published
from lgvit_fast.checkpoints import hub as hub_module
from lgvit_fast.checkpoints.torch_files import load_state_dict
from lgvit_fast.data.sources import open_dataset
from lgvit_fast.training import TrainConfig, train
from lgvit_fast.training.checkpoint import Checkpoint
from lgvit_fast.training.identity import load_stage1
from tests.helpers import tiny_model, tiny_vit


class Mine:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A path that the planted pickles would make; it must not be there at the end."""
    path = tmp_path / "ran"
    check = tmp_path / "works"
    pickle.loads(pickle.dumps(Mine(check)))
    assert check.is_dir()  # the charge does go off where it is unpickled
    yield path
    assert not path.exists()


@pytest.fixture
def saved(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def plant(path, marker, form):
    """Write a pickle that runs code, in one of the forms that torch reads."""
    if form == "plain":
        path.write_bytes(pickle.dumps({"weight": Mine(marker)}))
    else:
        torch.save({"weight": Mine(marker)}, path, _use_new_zipfile_serialization=form == "zip")
    return path


FORMS = ["plain", "legacy", "zip"]


# ------------------------------------------------------------------------------------ no code runs


@pytest.mark.parametrize("form", FORMS)
def test_no_pickle_is_loaded_from_a_model_folder(saved, marker, form, monkeypatch):
    plant(saved / "model.safetensors", marker, form)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        lgvit_fast.LGViT.from_pretrained(saved)
    monkeypatch.setattr(hub_module, "hf_hub_download", lambda name, file, **_: str(saved / file))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        lgvit_fast.LGViT.from_pretrained("someone/planted")


@pytest.mark.parametrize("form", FORMS)
def test_no_pickle_is_loaded_by_a_config(saved, marker, form, tmp_path):
    planted = plant(tmp_path / "planted.pth", marker, form)
    before = (saved / "config.json").read_text()
    for key, value in (
        ("checkpoint_path", str(planted)),
        ("pretrained_cfg_overlay", {"file": str(planted)}),
        ("pretrained_cfg_overlay", {"url": planted.as_uri()}),
        ("pretrained_cfg", {"file": str(planted)}),
        ("pretrained", True),
        ("cache_dir", str(tmp_path)),
    ):
        (saved / "config.json").write_text(before)
        change_config(saved, lambda c, k=key, v=value: c["backbone"]["args"].update({k: v}))
        with pytest.raises(ValueError, match=rf"config\.json.*{key}.*give it as backbone="):
            lgvit_fast.LGViT.from_pretrained(saved)
    config = TrainConfig(model_kwargs={"checkpoint_path": str(planted)})
    config.save(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"model_kwargs of .*checkpoint_path"):
        TrainConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize("form", FORMS)
def test_no_pickle_is_loaded_as_a_checkpoint(tmp_path, marker, form):
    path = plant(tmp_path / "checkpoint.safetensors", marker, form)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
        Checkpoint.load(path)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
        load_stage1(path, tiny_model())
    run = tmp_path / "run" / "stage1"
    run.mkdir(parents=True)
    plant(run / "checkpoint.safetensors", marker, form)
    config = TrainConfig(
        output=str(run.parent),
        model="vit_tiny_patch16_224",
        model_kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
        resume=True,
        device="cpu",
        tensorboard=False,
        progress=False,
        workers=0,
    )
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
        train(config)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.safetensors"])
def test_no_pickle_is_loaded_as_a_foreign_checkpoint(tmp_path, marker, form, name):
    path = plant(tmp_path / name, marker, form)
    for load in (
        load_published,
        lgvit_fast.checkpoints.from_huggingface,
        lgvit_fast.checkpoints.from_torchvision,
    ):
        with pytest.raises(ValueError, match=name):
            load(path)


def test_no_pickle_is_loaded_beside_a_tar(tmp_path, marker):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        entry = tarfile.TarInfo("images/a/0.png")
        entry.size = len(picture.getvalue())
        tar.addfile(entry, io.BytesIO(picture.getvalue()))
    os.truncate(tmp_path / "data.tar", 11 << 30)  # a hole; timm looks for the pickle from 10 GB on
    (tmp_path / "_data_tarinfos.pickle").write_bytes(pickle.dumps(Mine(marker)))
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        open_dataset(str(tmp_path / "data.tar"))


def test_the_timm_that_is_required_reads_no_such_pickle():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    (timm_requirement,) = [r for r in found if r.name == "timm"]
    assert not timm_requirement.specifier.contains("1.0.27")
    assert timm_requirement.specifier.contains("1.0.28")


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:someone/model",
        "local-dir:/tmp",
        "lgvit_tiny_patch16_224",
        "/etc/passwd",
        "",
        3,
        None,
    ],
    ids=str,
)
def test_a_backbone_has_the_plain_name_of_a_timm_model(saved, name):
    change_config(saved, lambda config: config["backbone"].update(name=name))
    with pytest.raises(ValueError, match=r"config\.json: backbone\.name is"):
        lgvit_fast.LGViT.from_pretrained(saved)


def test_every_argument_of_the_backbones_has_a_rule():
    """Fails when a new timm has an argument that nobody has looked at."""
    taken = set()
    for kind in (VisionTransformer, SwinTransformer, SwinTransformerV2, Eva):
        taken |= set(inspect.signature(kind).parameters)
    modules = {"block_fn", "embed_layer", "mlp_layer"}
    assert taken - set(ARGUMENTS) <= modules | {"device", "dtype", "pretrained_window_sizes"}
    opened = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
    assert not (opened | {"cache_dir", "file", "url", "features_only"}) & set(ARGUMENTS)


def test_what_is_described_can_be_read_again(tmp_path):
    backbone = tiny_vit(class_token=False, global_pool="avg", act_layer="relu")
    backbone._model_args["checkpoint_path"] = "/weights.pth"  # where they came from is not kept
    described = describe_backbone(backbone)
    assert described is not None
    assert "checkpoint_path" not in described["args"]
    lgvit_fast.LGViT(backbone).save_pretrained(tmp_path)
    lgvit_fast.LGViT.from_pretrained(tmp_path)
    backbone._model_args["norm_layer"] = "../layers"
    assert describe_backbone(backbone) is None


# --------------------------------------------------------------------------- limits before memory


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("img_size", 32768, "expected an integer from 1 to 8192"),
        ("img_size", [8192, 8192], "does not fit the model"),
        ("depth", 2_000_000, "expected an integer from 1 to 512"),
        ("depth", 500, "500 blocks, but the weights only"),
        ("depth", 7, "does not fit the model; missing"),
        ("embed_dim", 65_536, "does not fit the model"),
        ("embed_dim", -1, "expected an integer"),
        ("num_heads", 0, "expected an integer"),
        ("mlp_ratio", float("inf"), "expected a number"),
        ("qkv_bias", "yes", "expected true or false"),
        ("global_pool", "../x", "expected one of"),
    ],
    ids=str,
)
def test_sizes_are_refused_before_memory_is_taken(saved, where, value, message):
    change_config(saved, lambda config: config["backbone"]["args"].update({where: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        lgvit_fast.LGViT.from_pretrained(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_tables_that_no_file_holds_have_a_limit(tmp_path):
    """Swin's weights do not grow with the image, but its masks do."""
    backbone = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(2, 2), num_heads=(2, 2)
    )
    lgvit_fast.LGViT(backbone, exits=[2], num_classes=3).save_pretrained(tmp_path)
    lgvit_fast.LGViT.from_pretrained(tmp_path)
    change_config(tmp_path, lambda config: config["backbone"]["args"].update(img_size=8192))
    with pytest.raises(ValueError, match="tables of"):
        lgvit_fast.LGViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", 2**40),
        ("num_classes", None),
        ("num_heads", 0),
        ("exits", [{"layer": 1, "head": "linear"}] * 600),
        ("exits", [{"layer": 1, "head": "gah_99999"}]),
        ("exits", [{"layer": 1}]),
        ("pool", "x"),
        ("class_names", [1, 2]),
        ("policy", {"name": []}),
        ("policy", 3),
        ("backbone", 3),
    ],
    ids=str,
)
def test_entries_of_another_kind_are_refused(saved, key, value):
    change_config(saved, lambda config: config.update({key: value}))
    with pytest.raises(ValueError, match=r"config\.json"):
        lgvit_fast.LGViT.from_pretrained(saved)


def test_a_header_of_a_million_tensors_is_refused_unread(saved):
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(210_000)) + "}").encode()
    (saved / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="210000 tensors"):
        lgvit_fast.LGViT.from_pretrained(saved)
    (saved / "model.safetensors").write_bytes((60 << 20).to_bytes(8, "little"))
    os.truncate(saved / "model.safetensors", 61 << 20)  # as much as a million entries take
    with pytest.raises(ValueError, match="a header of 62914560 bytes"):
        lgvit_fast.LGViT.from_pretrained(saved)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_tensor_that_repeats_one_element_is_refused(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    bomb = {"weight": torch.zeros(1).expand(1_400_000_000)}
    torch.save(bomb, path, _use_new_zipfile_serialization=zipped)
    assert path.stat().st_size < 2000
    with pytest.raises(ValueError, match="more than is stored of it"):
        load_published(path)


def test_a_compressed_archive_is_refused(tmp_path):
    plain, path = tmp_path / "plain.bin", tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(1_000_000)}, plain)
    with (
        zipfile.ZipFile(plain) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match="compressed"):
        load_published(path)


def test_a_storage_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(77_777)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    declared = b"J" + (77_777).to_bytes(4, "little")
    assert data.count(declared) >= 1
    path.write_bytes(data.replace(declared, b"J" + (2**31 - 1).to_bytes(4, "little"))[:1000])
    with pytest.raises(ValueError, match="larger than the file"):
        load_published(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_whole_state_dicts_are_read(tmp_path, zipped):
    weight = torch.randn(3, 4)
    tensors = {"a": weight, "tied": weight, "turned": weight.t(), "half": weight.half()}
    tensors |= {"counts": torch.arange(3), "empty": weight[:0], "brain": weight.bfloat16()}
    tensors["parameter"] = torch.nn.Parameter(weight)
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    again = load_state_dict(tmp_path / "x.bin")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 10**9},
        {"image_size": "large"},
        {"num_attention_heads": 0},
        {"layer_norm_eps": "x"},
        {"position_exits": "[[1]]"},
        {"position_exits": 3},
        {"id2label": {"0": 1}},
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused(change):
    tensors, settings = export_published(tiny_model())
    with pytest.raises(ValueError, match=next(iter(change)) + r"|published checkpoint"):
        load_published(tensors, {**settings, **change})


def test_a_block_numbered_two_million_makes_no_such_model():
    tensors, settings = export_published(tiny_model())
    name = "deit.encoder.layer.0.layernorm_before.weight"
    tensors[name.replace(".0.", ".2000000.")] = tensors[name]
    with pytest.raises(ValueError, match="up to 2000000, not all"):
        load_published(tensors, settings)


def test_pipes_are_not_opened(saved):
    (saved / "model.safetensors").unlink()
    os.mkfifo(saved / "model.safetensors")
    with pytest.raises(ValueError, match="no regular file"):
        lgvit_fast.LGViT.from_pretrained(saved)


# ------------------------------------------------------------------------------- damage, full disks


def test_every_flipped_bit_of_the_data_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    files.save_weights(path, {"a": torch.randn(3, 5), "b": torch.arange(4)}, {"format": "x"})
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8 * start, 8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"w\.safetensors is damaged: [ab] does not match"):
            files.load_weights(path)


def test_flipped_bits_of_the_header_never_change_what_is_loaded(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {"first": torch.randn(2, 3), "second": torch.randn(3, 2)}
    files.save_weights(path, tensors, {"format": "x"})
    whole = path.read_bytes()
    refused = 0
    bits = range(8 * (8 + int.from_bytes(whole[:8], "little")))
    for bit in bits:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded, _ = files.read_weights(path)
        except ValueError as error:
            refused += "w.safetensors" in str(error)
        else:  # only the name of the checksums' own entry is not covered by them
            assert loaded.keys() == tensors.keys()
            assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert refused >= 0.9 * len(bits)


def test_swapped_tensors_are_found(tmp_path):
    path = tmp_path / "w.safetensors"
    files.save_weights(path, {"aa": torch.zeros(3), "bb": torch.ones(3)})
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"aa":{', b'"cc":{').replace(b'"bb":{', b'"aa":{'))
    with pytest.raises(ValueError, match=r"damaged|not a whole"):
        files.load_weights(path)


def test_a_file_without_checksums_still_loads(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "old.safetensors", {"format": "pt"})
    assert torch.equal(files.load_weights(tmp_path / "old.safetensors")["a"], torch.ones(3))


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "lgvit-fast training checkpoint 1"},
        {"format": "lgvit-fast training checkpoint 1", "state": "{", "facts": "{}"},
        {"format": "lgvit-fast training checkpoint 1", "state": "[]", "facts": "3"},
        {
            "format": "lgvit-fast training checkpoint 1",
            "state": '{"__tensor__": "gone"}',
            "facts": "{}",
        },
        {"format": "lgvit-fast training checkpoint 1", "state": '{"a": 1}', "facts": "{}"},
        {"crc32": "x"},
        {"crc32": "[]"},
    ],
    ids=str,
)
def test_header_faults_name_the_file(tmp_path, metadata):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "c.safetensors", metadata)
    with pytest.raises(ValueError, match=r"c\.safetensors"):
        Checkpoint.load(tmp_path / "c.safetensors")


FULL = """
import resource, signal, sys, torch
from lgvit_fast.checkpoints import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda: files.save_weights(sys.argv[1], {"a": torch.zeros(100_000)}),
    lambda: files.save_text(sys.argv[1], "x" * 200_000),
):
    try:
        write()
    except OSError as error:
        print(error.errno, error)
"""


def test_an_error_of_the_disk_names_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("before")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("27 ") and line.endswith(f"'{path}'") for line in lines), lines
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
