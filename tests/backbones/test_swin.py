"""What is particular to Swin: stages of their own grid and width, and the exits' places in them."""

import pytest
import torch

import lgvit_fast
from lgvit_fast.heads.layout import default_heads, default_layers
from tests.helpers import images, tiny_swin

SWIN_B = (2, 2, 18, 2)


def test_published_layout_of_swin_b():
    layers = default_layers(24, 8, SWIN_B)
    assert layers == (4, 7, 10, 13, 16, 19, 22, 23)
    full, light = ("lph_full",) * 2, ("lph_light",) * 2
    assert default_heads(layers, 24, (1, 2)) == (*full, *light, *("gah_1",) * 2, *("gah_2",) * 2)


@pytest.mark.parametrize(
    "depths", [(2, 2, 6, 2), SWIN_B, (2, 2, 2, 2), (1, 1, 1, 1), (2, 2), (3, 4, 1)]
)
def test_any_depths_and_count_of_exits(depths):
    total = sum(depths)
    for count in range(1, total):
        layers = default_layers(total, count, depths)
        assert len(layers) == count
        assert list(layers) == sorted(set(layers))
        assert layers[0] >= 1 and layers[-1] < total


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_all_sizes_by_name(size):
    with torch.device("meta"):
        model = lgvit_fast.create_model(f"swin_{size}_patch4_window7_224")
    depth = 12 if size == "tiny" else 24
    assert model.num_blocks == depth
    assert len(model.exits) == 8
    widths = [head.classifiers[0].in_features for head in model.exit_heads]
    base = {"tiny": 96, "small": 96, "base": 128, "large": 192}[size]
    assert widths == [base * 2, *[base * 4] * 6, base * 8]


@torch.no_grad()
def test_an_exit_after_every_block():
    model = tiny_swin(exits=list(range(1, 12)))
    batch = images(4, (48, 48))
    out = model.forward_exits(batch, features=True)
    widths = [feature.shape[-1] for feature in out.features]
    assert widths == [16] * 2 + [32] * 2 + [64] * 6 + [128]
    for index, logits in enumerate(out.exits):
        result = model.infer(batch, lgvit_fast.Replay([index] * 4))
        torch.testing.assert_close(result.logits, logits, atol=1e-4, rtol=1e-4)
        assert result.exit_layer.tolist() == [index + 1] * 4


def median_confidence(model, batch):
    """A policy that lets about half of the images that reach an exit leave there."""
    with torch.no_grad():
        exits = model.forward_exits(batch).exits
    return lgvit_fast.Confidence([float(x.softmax(-1).amax(-1).median()) for x in exits])


@pytest.mark.parametrize("patient", [True, False], ids=["patience", "confidence"])
def test_an_answer_does_not_depend_on_the_batch(patient):
    """Images leave within and between stages; the state of the others moves with them."""
    model = tiny_swin(exits=[1, 2, 4, 5, 7, 9, 11])
    batch = images(12, (48, 48))
    policy = lgvit_fast.Patience(2) if patient else median_confidence(model, batch)
    together = model.infer(batch, policy)
    assert len(set(together.exit_index.tolist())) > 1
    for i in range(12):
        alone = model.infer(batch[i : i + 1], policy)
        assert alone.exit_index.item() == together.exit_index[i].item()
        torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("graphs", [False, "eager"])
def test_the_engine_gives_the_same_answers(graphs):
    model = tiny_swin()
    batch = images(12, (48, 48))
    policy = median_confidence(model, batch)
    expected = model.infer(batch, policy)
    assert len(set(expected.exit_index.tolist())) > 3
    got = lgvit_fast.Engine(model, max_batch=8, graphs=graphs)(batch, policy)
    assert got.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="strict_img_size=False"):
        tiny_swin().infer(images(1, (64, 64)))
    loose = tiny_swin(strict_img_size=False)
    with pytest.raises(ValueError, match="multiples of its 4 x 4"):
        loose.infer(images(1, (50, 48)))


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = tiny_swin(drop_path_rate=0.0).train()
    batch = images(2, (48, 48))
    plain = model(batch).final
    model.backbone.set_grad_checkpointing()
    again = model(batch).final
    torch.testing.assert_close(again, plain)
    again.sum().backward()
    assert model.backbone.patch_embed.proj.weight.grad is not None


def test_layer_decay_groups_cover_every_parameter():
    from timm.optim import param_groups_layer_decay

    model = tiny_swin()
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
