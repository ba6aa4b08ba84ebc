"""`lgvit-fast report` from folder to page, and what it refuses."""

import shutil

import pytest
import torch

import lgvit_fast
from lgvit_fast.cli import main
from tests.cli.conftest import CLASSES, save_image


@pytest.fixture
def photos(tmp_path):
    """Class folders, four images each."""
    for place, name in enumerate(CLASSES):
        for number in range(4):
            save_image(tmp_path / "data" / name / f"{number}.png", 10 * place + number)
    return tmp_path / "data"


QUICK = ["--engines", "eager", "--precisions", "float32", "--batch", "2", "--rounds", "1"]
QUICK += ["--timing-images", "4"]


def test_from_folder_to_page(saved, photos, tmp_path, capsys):
    save_image(photos / "ant" / "<script>alert(1)<script>.png", 99)
    (photos / "bee" / "torn.png").write_text("no image")
    rival = tmp_path / "a rival"
    shutil.copytree(saved, rival)
    out = tmp_path / "new" / "report.html"
    command = ["report", saved, "--data", str(photos), "--out", str(out), *QUICK]
    assert main([*command, "--rivals", str(rival), "--note", "A <note>."]) == 1
    shown = capsys.readouterr()
    assert "Batch 2: " in shown.out and str(out) in shown.out
    assert "cannot read" in shown.err and "torn.png" in shown.err
    page = out.read_text("utf-8")
    assert "29 images of" in page and "A &lt;note&gt;." in page
    assert page.count("<script") == 1
    rows = page.partition("<tbody>")[2].partition("</tbody>")[0]
    assert rows.count("<tr") == 3 and "a rival (early exit)" in rows
    assert "torn.png" in page


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--rivals", "no_such_model"], 1, "timm has no 'no_such_model'"),
        (["--engines", "abacus"], 1, "engines=('abacus',)"),
        (["--engines", "compiled"], 1, "need eager and float32"),
        (["--images", "5"], 1, "images=5, expected at least 20"),
        (["--tolerance", "-1"], 1, "tolerance=-1.0"),
        (["--threshold", "0.5"], 2, "--threshold needs --policy"),
        (["--out", "/proc/report.html"], 1, "--out /proc/report.html cannot be written"),
        (["--out", "/"], 1, "--out / is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(
    saved, photos, tmp_path, capsys, monkeypatch, options, code, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", saved, "--data", str(photos), *options]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert not (tmp_path / "report.html").exists()


def test_a_rival_of_other_classes(saved, photos, tmp_path, capsys):
    from tests.helpers import tiny_model

    other = tiny_model(exits=4)
    other.class_names = [*CLASSES[:-1], "yak"]
    other.save_pretrained(tmp_path / "other")
    few = tiny_model(exits=4, num_classes=3)
    few.save_pretrained(tmp_path / "few")
    for name, message in (
        ("other", "class 6 is 'yak', the model's is 'gnu'"),
        ("few", "has 3 classes, expected the model's 7"),
    ):
        command = ["report", saved, "--data", str(photos), "--rivals", str(tmp_path / name)]
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_too_few_images_one_class_and_no_labels(saved, tmp_path, capsys):
    def refused(folder):
        code = main(["report", saved, "--data", str(folder), "--out", str(tmp_path / "o.html")])
        assert code == 1
        return capsys.readouterr().err

    for number in range(19):
        save_image(tmp_path / "few" / CLASSES[number % 7] / f"{number}.png", number)
    assert "19 images, expected at least 20" in refused(tmp_path / "few")
    for number in range(22):
        save_image(tmp_path / "one" / "cat" / f"{number}.png", number)
        save_image(tmp_path / "flat" / f"{number}.png", number)
    assert "all images are of class 2, expected several classes" in refused(tmp_path / "one")
    assert "error" in refused(tmp_path / "flat")


def test_images_without_labels_and_broken_logits(saved):
    from lgvit_fast.data.batches import Batch
    from lgvit_fast.evaluation.report import make_report
    from tests.helpers import images

    class Source:
        class_names = ()
        labelled = False

        def __len__(self):
            return 30

        def __getitems__(self, keys):
            targets = torch.tensor([place % 7 for _, place in keys]) if self.labelled else None
            return Batch(images(len(keys)), targets, [])

    model, source = lgvit_fast.LGViT.from_pretrained(saved), Source()
    with pytest.raises(ValueError, match="the images have no labels"):
        make_report(model, lambda spec: source, name="a model")
    source.labelled = True
    with torch.no_grad():
        model.backbone.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="logits of 30 of 30 images hold NaN"):
        make_report(model, lambda spec: source, name="a model")
    with pytest.raises(RuntimeError, match="eval mode"):
        make_report(model.train(), lambda spec: source, name="a model")
