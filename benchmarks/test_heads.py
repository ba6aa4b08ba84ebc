"""Exits at ViT-B/16 sizes: training form (plain), exact form in torch, and the fused backend.

OMP_NUM_THREADS=2 pytest --benchmark-only benchmarks/test_heads.py --benchmark-json=heads.json
A group holds one head at one batch size and dtype: its ratios are read off the table.
"""

import pytest
import torch

from lgvit_fast.bench.heads import HEADS, calls
from lgvit_fast.clock import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("way", ["plain", "torch", "fused"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_heads(benchmark, dtype, batch, head, way):
    with torch.inference_mode():
        call = calls(head, batch, dtype, DEVICE)[way]
        benchmark.group = f"{head} batch={batch} {str(dtype).removeprefix('torch.')}"
        rounds = 40 if batch == 1 else 9
        benchmark.pedantic(
            lambda: (call(), synchronize(DEVICE)), rounds=rounds, warmup_rounds=3, iterations=1
        )
