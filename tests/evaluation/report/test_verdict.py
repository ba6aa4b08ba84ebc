"""The decision in words, from rows alone."""

import pytest

from lgvit_fast.evaluation.report import verdicts
from tests.evaluation.report.samples import row, rows


def only(*some, tolerance=1.0):
    (verdict,) = verdicts(list(some), tolerance)
    return verdict, " ".join((verdict.headline, *verdict.sentences))


def test_every_kind_is_compared_with_the_fastest_full_model_in_float32():
    verdict, other = verdicts(rows())
    assert (verdict.batch_size, other.batch_size) == (1, 32)
    assert verdict.sentences[0] == (
        "The full model takes 17 ms an image at best in float32 (ONNX Runtime) and is 90.0 % right."
        " Against that early exit is 1.7x at -0.4 points (ONNX Runtime); the int8 full model 1.6x at"
        " -0.9 (ONNX Runtime); both together 2.9x at -1.0 (ONNX Runtime); vit_small 1.4x at -4.0"
        " (PyTorch, float32)."
    )
    assert verdict.use_early_exit
    assert verdict.headline == "Use early exit on ONNX Runtime in int8: 2.9x at -1.0 points."
    assert "2.88x by the clock, 2.00x in layers" in " ".join(verdict.sentences)


def test_not_where_the_full_model_is_as_fast():
    verdict, text = only(row(ms=10.0), row(early=True, ms=9.9, drop=-5))
    assert not verdict.use_early_exit
    assert text.startswith("Do not use early exit here: the full model takes 10 ms an image")
    assert "doubt" not in text


def test_the_full_model_on_another_runtime_counts():
    pays = row(ms=20.0), row(early=True, ms=10.0)
    assert only(*pays)[0].use_early_exit
    verdict, _ = only(*pays, row("openvino", ms=9.0))
    assert not verdict.use_early_exit and "OpenVINO in float32" in verdict.headline


def test_not_where_it_loses_more_than_is_tolerated():
    some = row(ms=20.0), row(early=True, ms=10.0, drop=25)
    verdict, _ = only(*some)
    assert not verdict.use_early_exit
    assert "it loses 2.5 points under this policy, more than the 1 tolerated" in verdict.headline
    assert "lgvit-fast calibrate" in verdict.headline
    assert only(*some, tolerance=3.0)[0].use_early_exit


def test_not_where_int8_is_faster_within_the_tolerance():
    some = row(ms=20.0), row(early=True, ms=10.0, drop=2)
    verdict, text = only(*some, row("onnxruntime", "int8", ms=8.0, drop=9))
    assert not verdict.use_early_exit
    assert "the int8 full model on ONNX Runtime in int8 takes 8 ms" in verdict.headline
    assert "is fastest: 2.5x at -0.9 points" in text
    assert only(*some, row("onnxruntime", "int8", ms=8.0, drop=50))[0].use_early_exit


def test_not_where_a_rival_is_as_fast_and_more_accurate():
    some = row(ms=20.0), row(early=True, ms=10.0, drop=2)
    assert not only(*some, row(rival="small", ms=10.1, drop=-3))[0].use_early_exit
    assert only(*some, row(rival="small", ms=10.1, drop=9))[0].use_early_exit
    assert only(*some, row(rival="small", ms=14.0, drop=-3))[0].use_early_exit


def test_a_rivals_early_exit_is_not_the_models():
    verdict, text = only(row(ms=20.0), row(early=True, rival="theirs", ms=5.0))
    assert not verdict.use_early_exit
    assert "no way of running it could be measured" in text and "theirs 4.0x" in text


def test_few_images_leave_doubt():
    def early(images):
        return row(early=True, ms=10.0, images=images)

    assert "doubt" in only(row(ms=20.0, images=100), early(100))[1]
    assert "doubt" not in only(row(ms=20.0, images=5000), early(5000))[1]


def test_no_change_has_no_sign():
    assert "2.0x at ±0.0 points" in only(row(ms=20.0), row(early=True, ms=10.0))[1]


def test_nothing_to_compare_with():
    with pytest.raises(ValueError, match="no full model in float32"):
        verdicts([row(early=True, ms=1.0)])
    with pytest.raises(ValueError, match="tolerance=-1"):
        verdicts(rows(), -1)
