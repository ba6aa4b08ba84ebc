"""The recipe comparison's own parts: what it counts, how it reads curves, what it trains on."""

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import lgvit_fast
from benchmarks.recipes_real import Images, load_recording, save_recording, warm_start
from benchmarks.recipes_report import cumulative_multiply_adds, halves, interval
from lgvit_fast.evaluation import Recording
from lgvit_fast.heads import ExitSpec


def small(heads, monkeypatch, classes=6):
    monkeypatch.setattr(timm.layers.attention, "use_fused_attn", lambda *_: False)
    torch.manual_seed(0)
    return lgvit_fast.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=3, embed_dim=32, num_heads=2, mlp_ratio=4,
        num_classes=classes, exits=[1, 2], heads=heads,
    )  # fmt: skip


def counted(function, images):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(images)
    return counter.get_total_flops() / 2 / len(images)


@pytest.mark.parametrize("heads", ["linear", "vit_ee"])
def test_multiply_adds_are_those_that_torch_counts(heads, monkeypatch):
    model = small(heads, monkeypatch).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    images = torch.zeros(2, 3, 48, 48)
    work, dense = cumulative_multiply_adds(model.exits, 3, 32, 6, blocks=3)
    assert counted(model.backbone, images) == dense
    assert counted(model.forward_exits, images) == work[-1]


def test_local_and_global_heads_cost_little_beside_a_block():
    exits = [ExitSpec(4, "lph_full"), ExitSpec(6, "lph_light"), ExitSpec(8, "gah_2")]
    work, dense = cumulative_multiply_adds(exits, grid=6, width=192, classes=10)
    assert work[0] < work[1] < work[2] < work[3]
    assert dense < work[3] < 1.03 * dense


def test_accuracy_at_a_ratio_by_hand():
    """Two kinds of images: sure and right at the exit, or unsure and wrong there."""
    count, classes = 400, 4
    targets = torch.arange(count) % classes
    sure = torch.arange(count) % 8 < 4
    right = torch.nn.functional.one_hot(targets, classes) * 9.0
    unsure = torch.nn.functional.one_hot((targets + 1) % classes, classes) * 1.0
    unsure = unsure + torch.rand(count, 1) * unsure  # of different degrees
    first = torch.where(sure[:, None], right + torch.rand(count, 1) * right, unsure)
    recording = Recording(torch.stack((first, right)), targets, (3, 12))
    share = sure.double().mean().item()

    def mean_layer(shares):
        return float(shares @ np.asarray(recording.layers, dtype=float))

    safe = 12 / (3 * share + 12 * (1 - share))
    for half, expected in ((safe - 0.2, 1.0), (3.0, None)):
        (found,) = halves(recording, "confidence", [half], mean_layer, 12.0)
        if expected is not None:
            assert found.right.mean() == pytest.approx(expected)
            assert found.layer_ratio == pytest.approx(half, rel=0.1)
            assert len(found.right) == count
        else:
            assert found.right.mean() < 0.8
    assert halves(recording, "confidence", [4.5], mean_layer, 12.0) == [None]


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30 / 3**0.5))
    assert interval([5.0, 7.0]) == (6.0, None)


def test_images_are_mirrored_by_seed_epoch_and_place():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 4), dtype=np.uint8)
    images = Images(pixels, torch.zeros(40, dtype=torch.long), ["a"], seed=1)
    keys = [(0, i) for i in range(40)]
    once, again = images.__getitems__(keys).images, images.__getitems__(keys).images
    torch.testing.assert_close(once, again)
    plain = images.part(torch.arange(40), None).__getitems__(keys).images
    mirrored = [not torch.equal(a, b) for a, b in zip(once, plain, strict=True)]
    assert 5 < sum(mirrored) < 35
    torch.testing.assert_close(once[mirrored], plain[mirrored].flip(-1))
    assert plain.min() >= -1 and plain.max() <= 1


@pytest.mark.parametrize("heads", ["lgvit", "linear", "vit_ee"])
def test_a_warm_start_agrees_with_the_final_classifier(heads, monkeypatch):
    model = small(heads, monkeypatch).eval()
    torch.nn.init.normal_(model.backbone.head.weight)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 3, 48, 48), dtype=np.uint8)[rng.integers(0, 6, 300)]
    pixels = np.clip(pixels.astype(int) + rng.integers(-9, 10, pixels.shape), 0, 255).astype(
        np.uint8
    )
    images = Images(pixels, torch.zeros(300, dtype=torch.long), ["a"])

    def agreement():
        with torch.no_grad():
            out = model.eval().forward_exits(
                images.__getitems__([(0, i) for i in range(300)]).images
            )
        return [(e.argmax(-1) == out.final.argmax(-1)).double().mean().item() for e in out.exits]

    warm_start(model, images)
    assert min(agreement()) > 0.9


def test_recordings_come_back(tmp_path):
    recording = Recording(
        torch.randn(3, 5, 4).half().float(), torch.tensor([0, 1, 2, 3, 0]), (2, 5, 7)
    )
    save_recording(recording, tmp_path / "r.safetensors")
    back = load_recording(tmp_path / "r.safetensors")
    assert back.layers == recording.layers
    torch.testing.assert_close(back.logits, recording.logits)
    torch.testing.assert_close(back.targets, recording.targets)
