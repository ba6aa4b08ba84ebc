"""`Inference`: indexing, moving, names, the likeliest classes, a short repr."""

import pytest
import torch
from PIL import Image

import lgvit_fast
from lgvit_fast import Inference, Replay
from tests.helpers import images, tiny_model


@pytest.fixture
def answer():
    model = tiny_model(exits=[2, 4])
    model.class_names = list("abcdefg")
    return model.infer(images(5), Replay([0, 1, 2, 0, 0]))


def test_length_and_indexing_go_by_image(answer):
    assert len(answer) == 5
    assert answer[1].exit_index.tolist() == [1]
    assert answer[-1].exit_layer.tolist() == [2]
    assert answer[1:3].exit_layer.tolist() == [4, 6]
    assert answer[[0, 2]].exit_index.tolist() == [0, 2]
    assert answer[answer.exit_index == 0].exit_layer.tolist() == [2, 2, 2]
    assert [len(one) for one in answer] == [1] * 5
    with pytest.raises(IndexError, match="image 5, expected one of 5"):
        answer[5]


def test_it_moves_as_a_whole(answer):
    half = answer.cpu().to("cpu", torch.bfloat16)
    assert half.logits.dtype == torch.bfloat16
    assert half.exit_index.dtype == torch.int64 and half.nonfinite.dtype == torch.bool
    assert answer.to("meta").exit_layer.is_meta
    assert half.class_names == answer.class_names


def test_names_and_likeliest_classes(answer):
    assert answer.names == ["abcdefg"[number] for number in answer.prediction.tolist()]
    probabilities, classes = answer.topk(3)
    assert probabilities.shape == classes.shape == (5, 3)
    assert torch.equal(classes[:, 0], answer.prediction)
    torch.testing.assert_close(probabilities[:, 0], answer.confidence)
    assert answer.topk(100).classes.shape == (5, 7)
    with pytest.raises(ValueError, match="k=0"):
        answer.topk(0)
    answer.class_names = None
    assert answer.names == [str(number) for number in answer.prediction.tolist()]


def test_the_repr_is_one_line(answer):
    expected = "Inference(5 images: 3 after block 2, 1 after block 4, 1 after block 6)"
    assert repr(answer) == expected
    answer.nonfinite[0] = True
    assert repr(answer).endswith("; 1 nonfinite)")
    assert repr(answer[:0]) == "Inference(0 images)"


def test_parts_are_joined_in_order(answer):
    joined = Inference.cat([answer[:2], answer[2:]])
    assert torch.equal(joined.logits, answer.logits) and joined.class_names == answer.class_names


def test_an_engine_gives_the_names_too():
    model = tiny_model()
    model.class_names = list("abcdefg")
    assert lgvit_fast.Engine(model, 2)(images(3)).names == model.infer(images(3)).names


def test_dir_lists_the_public_names_alone():
    assert dir(lgvit_fast) == sorted(lgvit_fast.__all__)


def test_predict_takes_files_and_pictures_alike(tmp_path):
    model = tiny_model()
    pictures = [Image.new("RGB", (40 + n, 30), (n * 60, 90, 200 - n * 60)) for n in range(3)]
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    from_files, from_pictures = model.predict(paths, batch_size=2), model.predict(pictures)
    assert len(from_files) == 3
    torch.testing.assert_close(from_files.logits, from_pictures.logits)
    assert torch.equal(model.predict(paths[1]).exit_layer, from_files[1].exit_layer)
    assert len(model.predict([])) == 0
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png cannot be read"):
        model.predict([paths[0], tmp_path / "text.png"])
    with pytest.raises(ValueError, match="3, expected a path"):
        model.predict([3])


def test_an_answer_of_a_stream_has_the_same():
    model = tiny_model(exits=[2, 4])
    model.class_names = list("abcdefg")
    expected = model.infer(images(3), Replay([0, 1, 2]))
    answers = list(lgvit_fast.stream(model, [images(3)], 3, policy=Replay([0, 1, 2])))
    assert [answer.prediction for answer in answers] == expected.prediction.tolist()
    assert [answer.name for answer in answers] == expected.names
    assert answers[0].confidence == pytest.approx(expected.confidence[0].item(), abs=1e-4)
    assert torch.equal(answers[1].topk(2).classes, expected.topk(2).classes[1])
    assert answers[0].to(dtype=torch.bfloat16).cpu().logits.dtype == torch.bfloat16
    assert repr(answers[2]) == f"Answer(image 2: {expected.names[2]!r} after block 6)"
