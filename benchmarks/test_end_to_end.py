"""A whole model on the recorded distribution of exits, every way to run it beside dense timm.

pytest --benchmark-only benchmarks/test_end_to_end.py

`lgvit-fast bench model` measures more carefully (a process a way, in turns), the runtimes too.
"""

import pytest
import torch

import lgvit_fast
from lgvit_fast.bench.traces import REAL_TRACE
from lgvit_fast.bench.ways import in_torch, ways

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = (1, 64) if DEVICE == "cuda" else (1, 8)
WAYS = ("dense timm", "dense, prepared linears", "published scheme", "infer", "engine", "stream")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = lgvit_fast.create_model("vit_small_patch16_224", num_classes=100)
    return model.to(DEVICE).eval()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
def test_end_to_end(benchmark, model, batch, name):
    way = next((w for w in ways(DEVICE, compiled=False)[0] if w.name == name), None)
    if way is None:
        pytest.skip(f"there is no {name!r} at batch {batch} on {DEVICE}")
    count = 32 if batch < 32 else 4 * batch
    images = torch.randn(count, 3, 224, 224, device=DEVICE)
    start = in_torch(name, model, batch)
    policy = REAL_TRACE.policy(count, [spec.layer for spec in model.exits])

    def run():
        for call in start(images, policy, batch):
            call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"end to end, batch={batch}"
    benchmark.extra_info.update(images=count, dense=way.dense, trace=REAL_TRACE.name)
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info["images_per_second"] = count / benchmark.stats.stats.median
