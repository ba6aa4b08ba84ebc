"""`lgvit-fast predict`: files, folders and standard input to answers."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import lgvit_fast
from lgvit_fast import Confidence
from lgvit_fast.cli import main
from lgvit_fast.data import InputSpec, eval_transform
from tests.cli.conftest import CLASSES, save_image
from tests.helpers import tiny_model


def rows_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def expected(saved, path, policy=None):
    model = lgvit_fast.LGViT.from_pretrained(saved)
    with Image.open(path) as image:
        pixels = eval_transform(InputSpec.of(model.backbone))(image.convert("RGB"))
    return model.infer(pixels[None], policy)


def test_a_folder_with_bad_files_is_answered_and_reported(saved, photos, capsys):
    assert main(["predict", saved, str(photos), "--batch-size", "3"]) == 1
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    names = [row["path"].removeprefix(f"{photos}/") for row in rows]
    assert names == sorted(names) == [*(f"deep/{n}.png" for n in range(5)), "text.png", "torn.jpg"]
    assert "UnidentifiedImageError" in rows[5]["error"]
    assert "truncated" in rows[6]["error"]
    assert "2 files" in captured.err
    for row in rows[:5]:
        answer = expected(saved, row["path"])
        assert row["class_index"] == int(answer.prediction)
        assert row["label"] == CLASSES[row["class_index"]]
        assert row["confidence"] == pytest.approx(float(answer.confidence), abs=1e-4)
        assert row["exit_layer"] == int(answer.exit_layer)
        assert row["milliseconds"] > 0


def test_the_order_is_the_one_given(saved, photos, capsys):
    paths = [str(photos / name) for name in ("deep/3.png", "torn.jpg", "deep/0.png", "gone.png")]
    assert main(["predict", saved, *paths]) == 1
    rows = rows_of(capsys)
    assert [row["path"] for row in rows] == paths
    assert ["error" in row for row in rows] == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ([], Confidence()),
        (["--policy", "confidence", "--threshold", "0"], Confidence(0.0)),
        (["--policy", "entropy", "--threshold", "1.4"], lgvit_fast.Entropy(1.4)),
        (["--policy", "patience", "--patience", "2"], lgvit_fast.Patience(2)),
        (["--policy", "confidence", "--threshold", "1,1,0,1"], Confidence([1.0, 1.0, 0.0, 1.0])),
    ],
    ids=str,
)
def test_the_policy_decides_where_images_leave(saved, photos, capsys, options, policy):
    assert main(["predict", saved, str(photos / "deep"), *options]) == 0
    for row in rows_of(capsys):
        assert row["exit_layer"] == int(expected(saved, row["path"], policy).exit_layer)


def test_the_saved_policy_is_the_default(tmp_path, photos, capsys):
    model = tiny_model(exits=4)
    model.policy = Confidence([1.0, 0.0, 1.0, 1.0])
    model.save_pretrained(tmp_path / "m")
    assert main(["predict", str(tmp_path / "m"), str(photos / "deep")]) == 0
    rows = rows_of(capsys)
    assert {row["exit_layer"] for row in rows} == {model.exits[1].layer}
    assert all(row["label"] == str(row["class_index"]) for row in rows)  # it has no names


def test_csv(saved, photos, capsys):
    assert main(["predict", saved, str(photos), "--format", "csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 7
    assert [bool(row["error"]) for row in rows] == [False] * 5 + [True] * 2
    assert all(row["label"] in CLASSES for row in rows[:5])


def test_class_map(saved, photos, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {n}" for n in range(7)))
    assert main(["predict", saved, str(photos / "deep"), "--class-map", str(names)]) == 0
    assert all(row["label"] == f"kind {row['class_index']}" for row in rows_of(capsys))


def test_standard_input(saved, photos, monkeypatch, capsys):
    paths = [str(photos / "deep" / f"{number}.png") for number in (4, 1)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(paths) + "\n"))
    assert main(["predict", saved, "-"]) == 0
    assert [row["path"] for row in rows_of(capsys)] == paths


def test_nothing_on_standard_input_is_no_error(saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["predict", saved, "-"]) == 0
    assert capsys.readouterr().out == ""


def test_a_folder_without_images_is_an_error(saved, tmp_path, capsys):
    assert main(["predict", saved, str(tmp_path)]) == 1
    assert "no images in the folder" in capsys.readouterr().err


def test_a_model_for_grey_images_takes_any(tmp_path, capsys):
    tiny_model(exits=2, in_chans=1).save_pretrained(tmp_path / "m")
    save_image(tmp_path / "colour.png", 0)
    Image.new("LA", (9, 50), (3, 90)).save(tmp_path / "grey.png")
    Image.new("P", (50, 9), 3).save(tmp_path / "palette.png")
    assert main(["predict", str(tmp_path / "m"), str(tmp_path)]) == 0
    assert len(rows_of(capsys)) == 3


def test_an_image_the_model_cannot_digest_is_reported(tmp_path, photos, capsys):
    model = tiny_model(exits=2)
    with torch.no_grad():
        model.backbone.head.bias[0] = float("nan")
    model.policy = Confidence(1.0)
    model.save_pretrained(tmp_path / "m")
    assert main(["predict", str(tmp_path / "m"), str(photos / "deep" / "0.png")]) == 1
    (row,) = rows_of(capsys)
    assert "not finite" in row["error"]


HOSTILE = (
    b"\x1b[31m.png",
    b"two\nlines.png",
    b"caf\xe9.png",
    "\u202egnp.png".encode(),
    b"=1+1,2.png",
)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Images with names that do harm, in the current folder."""
    save_image(tmp_path / "here" / "0.png", 0)
    data = (tmp_path / "here" / "0.png").read_bytes()
    monkeypatch.chdir(tmp_path / "here")
    os.remove("0.png")
    for name in HOSTILE:
        with open(name, "wb") as file:
            file.write(data)
    return [os.fsdecode(name) for name in HOSTILE]


def predict_in_a_process(saved, *options, **more):
    script = "import sys; from lgvit_fast.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, "predict", saved, *options],
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"},
        **more,
    )


def test_hostile_names_in_json_lines(saved, hostile):
    done = predict_in_a_process(saved, "-", input=b"\n".join(HOSTILE[:1] + HOSTILE[2:]) + b"\n")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.isascii() and line.decode().isprintable() for line in lines)
    assert [json.loads(line)["path"] for line in lines] == hostile[:1] + hostile[2:]


def test_hostile_names_in_csv(saved, hostile, tmp_path):
    names = tmp_path / "names.txt"
    names.write_bytes(b"".join(b"@kind\x1b\xff %d\n" % n for n in range(7)))
    paths = [*HOSTILE, b"gone\x1b.png"]
    options = ("--format", "csv", "--csv-safe", "--class-map", str(names))
    done = predict_in_a_process(saved, *map(os.fsdecode, paths), *options)
    assert done.returncode == 1
    text = done.stdout.decode()
    assert all(line.isprintable() for line in text.split("\n"))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["path"] for row in rows] == [
        "\\x1b[31m.png", "two\\nlines.png", "caf\\udce9.png", "\\u202egnp.png", "'=1+1,2.png",
        "gone\\x1b.png",
    ]  # fmt: skip
    assert all(row["label"].startswith("'@kind\\x1b\\udcff ") for row in rows[:5])
    assert "FileNotFoundError" in rows[5]["error"]


def test_hostile_names_in_error_lines(saved, tmp_path, capsys):
    names = tmp_path / "\x1b[2J.txt"
    names.write_text("one\n")
    assert main(["predict", saved, "x.png", "--class-map", str(names)]) == 2
    error = capsys.readouterr().err
    assert "\\x1b[2J.txt names 1 classes" in error
    assert "\x1b" not in error


@pytest.mark.timeout(60)
def test_what_is_no_file_is_an_error_line(saved, tmp_path, capsys):
    save_image(tmp_path / "in" / "0.png", 0)
    os.mkfifo(tmp_path / "in" / "1.png")
    (tmp_path / "in" / "2.png").symlink_to("/dev/zero")
    assert main(["predict", saved, str(tmp_path / "in")]) == 1
    rows = rows_of(capsys)
    assert ["error" in row for row in rows] == [False, True, True]
    assert "a FIFO, expected an image file" in rows[1]["error"]
    assert "a device, expected an image file" in rows[2]["error"]


def test_topk_gives_the_next_classes(saved, photos, capsys):
    command = ["predict", saved, str(photos / "deep"), "--topk", "3"]
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 5
    for row in rows:
        answers = [row, *row["others"]]
        assert len(answers) == len({answer["class_index"] for answer in answers}) == 3
        assert all(answer["label"] == CLASSES[answer["class_index"]] for answer in answers)
        confidences = [answer["confidence"] for answer in answers]
        assert confidences == sorted(confidences, reverse=True)
        assert sum(confidences) <= 1.00001
    assert main([*command, "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label_3"] for row in table] == [row["others"][1]["label"] for row in rows]
    assert [float(row["confidence_2"]) for row in table] == [
        row["others"][0]["confidence"] for row in rows
    ]


def test_topk_beyond_the_classes_is_2(saved, capsys):
    assert main(["predict", saved, "x.png", "--topk", "8"]) == 2
    assert "--topk 8: the model has 7 classes" in capsys.readouterr().err
