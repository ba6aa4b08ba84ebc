import torch

from lgvit_fast.bench.heads import HEADS, bench_heads, markdown


def test_every_head_is_measured_and_right():
    rows = bench_heads(1, torch.float32, torch.device("cpu"), rounds=1)
    assert [row.head for row in rows] == list(HEADS)
    assert all(row.error <= 2e-5 for row in rows)
    assert all(row.plain_ms > 0 and row.torch_ms > 0 and row.fused_ms > 0 for row in rows)
    lines = markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert all(f"{row.ratio:.2f}x" in line for row, line in zip(rows, lines[2:], strict=True))
