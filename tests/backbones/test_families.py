"""Every family that docs/backbones.md lists: its exits change nothing about the dense model."""

import re
from pathlib import Path

import pytest
import timm
import torch

import lgvit_fast
from lgvit_fast.backbones import adapt
from tests.helpers import images, randomize

DOC = Path(__file__).parents[2] / "docs" / "backbones.md"

# timm name, what makes it tiny, image size
PLAIN = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 2}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", PLAIN, (32, 32)),
    "vit-gap": ("vit_base_patch16_gap_224", PLAIN, (32, 32)),
    "vit-parallel": ("vit_small_patch16_18x2_224", PLAIN, (32, 32)),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", PLAIN, (32, 32)),
    "deit3": ("deit3_small_patch16_224", PLAIN, (32, 32)),
    "dinov2": ("vit_small_patch14_dinov2", PLAIN | {"num_classes": 7}, (32, 32)),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", PLAIN, (32, 32)),
    "dinov3": ("vit_small_patch16_dinov3", PLAIN, (24, 40)),
    "siglip": ("vit_base_patch16_siglip_224", PLAIN, (32, 32)),
    "siglip-gap": ("vit_base_patch16_siglip_gap_224", PLAIN, (32, 32)),
    "clip": ("vit_base_patch16_clip_224", PLAIN, (32, 32)),
    "eva": ("eva_giant_patch14_224", PLAIN, (32, 32)),
    "eva02": ("eva02_tiny_patch14_224", PLAIN, (32, 32)),
    "rope-axial": ("vit_small_patch16_rope_224", PLAIN, (32, 32)),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", PLAIN, (32, 32)),
    "perception-encoder": ("vit_pe_core_tiny_patch16_384", PLAIN, (32, 32)),
    "swin": ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 32}, (32, 32)),
    "swin-s3": ("swin_s3_tiny_224", SWIN | {"img_size": 32}, (32, 32)),
    "swin-any-size": ("swin_tiny_patch4_window7_224", SWIN | {"strict_img_size": False}, (36, 52)),
    "swinv2": ("swinv2_tiny_window8_256", SWIN | {"img_size": 32}, (32, 32)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    name, options, size = FAMILIES[request.param]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    model = lgvit_fast.create_model(name, exits=[1, 2, 3], **{"num_classes": 7, **options})
    randomize(model)
    return model.eval(), images(5, size)


@torch.no_grad()
def test_without_early_exit_it_is_the_dense_model(family):
    model, batch = family
    expected = model.backbone(batch)
    torch.testing.assert_close(model.forward_exits(batch).final, expected, atol=1e-6, rtol=1e-6)
    result = model.infer(batch, lgvit_fast.Policy())
    torch.testing.assert_close(result.logits, expected, atol=1e-6, rtol=1e-6)
    assert result.exit_index.tolist() == [3] * 5


@torch.no_grad()
def test_answers_are_those_of_the_exits_taken(family):
    model, batch = family
    out = model.forward_exits(batch)
    every = torch.stack((*out.exits, out.final))
    result = model.infer(batch, lgvit_fast.Replay([2, 0, 3, 1, 0]))
    assert result.exit_index.tolist() == [2, 0, 3, 1, 0]
    expected = every[result.exit_index, torch.arange(5)]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)


def test_trains(family):
    model, batch = family
    out = model.train()(batch)
    try:
        sum(logits.square().mean() for logits in (*out.exits, out.final)).backward()
        missing = [n for n, p in model.exit_heads.named_parameters() if p.grad is None]
        assert not missing
        assert model.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
    finally:
        model.zero_grad()
        model.eval()


def test_survives_save_and_load(family, tmp_path):
    model, batch = family
    model.save_pretrained(tmp_path)
    again = lgvit_fast.LGViT.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.forward_exits(batch).final, model.forward_exits(batch).final)


def test_shapes_are_what_the_adapter_says(family):
    model, batch = family
    adapter, size = model.adapter, tuple(batch.shape[2:])
    with torch.no_grad():
        tokens = adapter.embed(batch)
        for layer in range(1, model.num_blocks + 1):
            grid = adapter.patch_grid(size, layer)
            tokens = adapter.blocks(tokens, layer - 1, layer, grid)
            count = adapter.num_prefix_tokens + grid[0] * grid[1]
            assert adapter.to_tokens(tokens).shape == (5, count, adapter.width(layer))
            assert tokens.is_contiguous()


def test_parts_hold_what_a_run_of_blocks_needs(family):
    model, _ = family
    held = {id(p) for segment in model.segments for p in segment.parts.parameters()}
    own = {n: id(p) for n, p in model.backbone.named_parameters()}
    stem = ("patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre")
    left_out = [n for n, i in own.items() if i not in held and not n.startswith(stem)]
    assert not left_out


@pytest.mark.parametrize(
    ("name", "options", "near"),
    [
        ("beit_base_patch16_224", {"depth": 1}, "VisionTransformer"),
        ("resnet18", {}, "VisionTransformer"),
        ("swinv2_cr_tiny_224", {"depths": (1, 1)}, "SwinTransformer"),
    ],
)
def test_what_cannot_work_names_the_nearest_that_does(name, options, near):
    with torch.device("meta"):
        backbone = timm.create_model(name, **options)
    with pytest.raises(ValueError, match=f"{type(backbone).__name__} is not supported.*{near}"):
        lgvit_fast.LGViT(backbone)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("eva02_tiny_patch14_224", {"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("vit_small_patch16_dinov3", {"rope_jitter_coords": 1.2}, "rope_jitter_coords"),
    ],
)
def test_options_that_exits_cannot_work_with_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        adapt(timm.create_model(name, **PLAIN, **options))


def test_the_document_lists_what_is_run_here():
    listed = set(re.findall(r"^\| [^|]+ \| `(\w+)`", DOC.read_text(), re.MULTILINE))
    assert listed == {name for name, *_ in FAMILIES.values()}
