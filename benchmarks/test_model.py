"""ViT-S/16 with and without early exit, images leaving evenly over the exits, beside dense timm.

pytest --benchmark-only benchmarks/test_model.py
"""

import pytest
import timm
import torch

import lgvit_fast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = timm.create_model("vit_small_patch16_224", num_classes=100)
    return lgvit_fast.LGViT(backbone).to(DEVICE).eval()


@pytest.mark.parametrize("way", ["dense-timm", "none-leave", "leaving-evenly"])
@pytest.mark.parametrize("batch", [1, 8])
def test_model(benchmark, model, batch, way):
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)
    last = len(model.exits)
    script = [last] * batch if way == "none-leave" else [i % (last + 1) for i in range(batch)]
    policy = lgvit_fast.Replay(script)
    benchmark.group = f"model batch={batch}"
    if way == "dense-timm":
        call = lambda: model.backbone(images)  # noqa: E731
    else:
        call = lambda: model.infer(images, policy)  # noqa: E731
        layers = model.infer(images, policy).exit_layer.float().mean().item()
        benchmark.extra_info["layer_ratio"] = model.num_blocks / layers
    benchmark.pedantic(lambda: (call(), _wait()), rounds=9, warmup_rounds=2)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
