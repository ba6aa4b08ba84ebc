"""The manifest of a folder from a stranger: every field is checked, every file verified."""

import dataclasses
import hashlib
import json

import pytest

import lgvit_fast
from lgvit_fast.deploy.manifest import Manifest, SegmentFile
from lgvit_fast.deploy.preprocess import Preprocessing

GRAPHS = (b"\x08\x0a", b"\x08\x0a\x08\x0a")  # protobuf messages of one and two numbers


def manifest(**changes):
    segments = tuple(
        SegmentFile(f"segment_{i}.onnx", hashlib.sha256(data).hexdigest(), len(data))
        for i, data in enumerate(GRAPHS)
    )
    made = Manifest(
        layers=(2, 6),
        heads=("lph_full",),
        num_classes=3,
        class_names=("cat", "dog", "猫"),
        policy=lgvit_fast.Confidence([0.8]),
        certificate={"confidence": 0.95},
        preprocessing=Preprocessing(3, (32, 24), (0.5,) * 3, (0.2,) * 3, "bicubic", 0.9),
        precision="float32",
        opset=20,
        segments=segments,
        made_with={"torch": "2"},
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def folder(tmp_path):
    manifest().save(tmp_path)
    for segment, data in zip(manifest().segments, GRAPHS, strict=True):
        (tmp_path / segment.file).write_bytes(data)
    return tmp_path


def change(folder, *path, **to):
    """Change or delete one field of the manifest."""
    content = json.loads((folder / "manifest.json").read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if to:
        inner[path[-1]] = to["to"]
    else:
        del inner[path[-1]]
    (folder / "manifest.json").write_text(json.dumps(content))


def test_survives_saving(folder):
    again = Manifest.load(folder)
    assert dataclasses.replace(again, policy=None) == manifest(policy=None)
    assert again.policy == lgvit_fast.Confidence([0.8])
    assert [again.read(folder, i) for i in range(2)] == list(GRAPHS)


def test_a_scripted_policy_is_not_saved(tmp_path):
    manifest(policy=lgvit_fast.Replay([0])).save(tmp_path)
    assert Manifest.load(tmp_path).policy is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers",), [6, 2]),
        (("layers",), []),
        (("layers",), [2.0, 6]),
        (("heads",), ["lph_full", "gah_2"]),
        (("num_classes",), True),
        (("num_classes",), 0),
        (("class_names",), ["cat"]),
        (("preprocessing",), None),
        (("preprocessing", "size"), [32]),
        (("preprocessing", "std"), [0.2, 0.2, 0.0]),
        (("preprocessing", "mean"), [0.5, 0.5, "0.5"]),
        (("preprocessing", "interpolation"), "random"),
        (("preprocessing", "crop_pct"), float("nan")),
        (("precision",), "float16"),
        (("segments",), [{}]),
        (("segments", 0, "sha256"), "00"),
        (("segments", 0, "bytes"), -1),
        (("made_with",), []),
    ],
    ids=str,
)
def test_a_field_that_cannot_be(folder, path, value):
    change(folder, *path, to=value)
    name = next(key for key in reversed(path) if isinstance(key, str))
    with pytest.raises(ValueError, match=rf"manifest\.json.* {name} = .*expected"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", ["layers", "heads", "precision", "preprocessing", "segments"])
def test_a_missing_field(folder, name):
    change(folder, name)
    with pytest.raises(ValueError, match=f"no field '{name}'"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    "name", ["../segment_0.onnx", "/etc/passwd", "a/b.onnx", "..", ".hidden", "a\\b", "", "C:x", 3]
)
def test_a_file_outside_the_folder(folder, name):
    change(folder, "segments", 0, "file", to=name)
    with pytest.raises(ValueError, match="plain name of a file in the folder"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"name": "Confidence", "threshold": [0.1, 0.2]}, "threshold has 2 entries"),
        ({"name": "Confidence", "threshold": 2}, "between 0 and 1"),
        ({"name": "os.system"}, "expected a name out of"),
    ],
)
def test_a_policy_that_cannot_be(folder, policy, message):
    change(folder, "policy", to=policy)
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        Manifest.load(folder)


def test_another_version(folder):
    change(folder, "version", to=2)
    with pytest.raises(ValueError, match=r"version 2, .* reads version 1: export the model anew"):
        Manifest.load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', "[" * 100_000])
def test_another_file(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"not json|no manifest of an exported model"):
        Manifest.load(folder)


def test_no_export(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=r"no exported model in .*lgvit-fast export"):
            Manifest.load(folder)


def test_a_missing_segment(folder):
    (folder / "segment_1.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"segment_1\.onnx is missing: copy the folder"):
        Manifest.load(folder).read(folder, 1)


def test_a_truncated_segment(folder):
    (folder / "segment_1.onnx").write_bytes(GRAPHS[1][:-1])
    with pytest.raises(ValueError, match=r"has 3 bytes, manifest.json says 4: it is truncated"):
        Manifest.load(folder).read(folder, 1)


def test_a_changed_segment(folder):
    (folder / "segment_1.onnx").write_bytes(b"\x08\x0a\x08\x0b")
    with pytest.raises(ValueError, match="does not have the SHA-256"):
        Manifest.load(folder).read(folder, 1)


def test_a_file_that_is_no_file(folder):
    (folder / "segment_1.onnx").unlink()
    (folder / "segment_1.onnx").mkdir()
    with pytest.raises(ValueError, match="truncated or another file"):
        Manifest.load(folder).read(folder, 1)


def test_a_graph_that_is_refused(folder):
    data = b"\x3a\x05hello"
    (folder / "segment_0.onnx").write_bytes(data)
    change(folder, "segments", 0, "sha256", to=hashlib.sha256(data).hexdigest())
    change(folder, "segments", 0, "bytes", to=len(data))
    with pytest.raises(ValueError, match=r"segment_0\.onnx is refused"):
        Manifest.load(folder).read(folder, 0)
