"""torchvision classifiers: the same logits."""

import pytest
import torch

import lgvit_fast
from lgvit_fast.checkpoints import from_torchvision
from tests.helpers import images, randomize

models = pytest.importorskip("torchvision.models")

MAKE = {
    "vit": lambda: models.VisionTransformer(32, 8, 4, 2, 32, 48, num_classes=7),
    "swin": lambda: models.SwinTransformer(
        [4, 4], 16, [2, 2, 2], [1, 2, 4], [4, 4], mlp_ratio=2.0, num_classes=7
    ),
}


@pytest.fixture(scope="module", params=MAKE)
def theirs(request):
    torch.manual_seed(0)
    model = MAKE[request.param]()
    randomize(model)
    return model.eval()


def check(model, theirs):
    batch = images(3, model.backbone.patch_embed.img_size)
    with torch.no_grad():
        out = model.forward_exits(batch)
        torch.testing.assert_close(out.final, theirs(batch), atol=1e-5, rtol=1e-5)


def test_logits_equal(theirs, tmp_path):
    model = from_torchvision(theirs, exits=2)
    assert len(model.exits) == 2
    check(model, theirs)
    model.save_pretrained(tmp_path)
    check(lgvit_fast.LGViT.from_pretrained(tmp_path), theirs)


def test_from_a_file(tmp_path):
    theirs = MAKE["swin"]().eval()
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    check(from_torchvision(tmp_path / "swin.pth"), theirs)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_the_real_sizes_fit(name):
    with torch.device("meta"):
        weights = models.get_model(name).state_dict()
    tensors = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in weights.items()}
    model = from_torchvision(tensors)
    assert model.num_blocks == 12
    attention = [m for m in model.backbone.modules() if hasattr(m, "num_heads")]
    assert attention[0].num_heads == (12 if name == "vit_b_16" else 3)


def test_bad_input():
    with pytest.raises(ValueError, match="from_torchvision"):
        lgvit_fast.LGViT(MAKE["vit"]())
    with torch.device("meta"):
        v2, resnet = models.swin_v2_t().state_dict(), models.resnet18().state_dict()
    with pytest.raises(ValueError, match="swinv2_tiny_window8_256"):
        from_torchvision(v2)
    with pytest.raises(ValueError, match="VisionTransformer or SwinTransformer"):
        from_torchvision(resnet)
