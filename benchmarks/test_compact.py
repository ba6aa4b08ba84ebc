"""Compaction at ViT-B/16 sizes: hole filling against gathering the survivors.

pytest --benchmark-only benchmarks/test_compact.py --benchmark-group-by=param:batch,param:leaving
"""

import pytest
import torch

from lgvit_fast import _extension
from lgvit_fast.ops import compact_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gather(tokens, keep, index):
    """What a plain implementation does: boolean indexing, a fresh copy of every survivor."""
    return tokens[keep], index[keep]


@pytest.mark.parametrize("way", ["gather", "torch", "cpp"])
@pytest.mark.parametrize("leaving", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("batch", [16, 64, 256])
def test_compact(benchmark, batch, leaving, way):
    if way == "cpp" and _extension.why_compact_missing(torch.device(DEVICE)):
        pytest.skip(_extension.why_compact_missing(torch.device(DEVICE)))
    generator = torch.Generator().manual_seed(0)
    keep = (torch.rand(batch, generator=generator) >= leaving).to(DEVICE)
    tokens = torch.randn(batch, 197, 768, device=DEVICE)
    index = torch.arange(batch, device=DEVICE)
    benchmark.group = f"compact batch={batch} leaving={leaving:.0%}"
    if way == "gather":
        benchmark(lambda: (gather(tokens, keep, index), _wait()))
    else:
        benchmark(lambda: (compact_(tokens, keep, index, backend=way), _wait()))


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
