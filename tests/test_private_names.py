"""Names of torch and timm that are not public: a version without one fails here, by its name."""

import ast
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lgvit_fast.backbones import timm_private
from lgvit_fast.ops import torch_private
from lgvit_fast.ops.linear import why_not

PACKAGE = Path(__file__).parents[1] / "lgvit_fast"
HOMES = {PACKAGE / "ops/torch_private.py", PACKAGE / "backbones/timm_private.py"}
PRIVATE = re.compile(
    r"(?<!lgvit_fast)\._(version|parameters|buffers|modules|pos_embed|model_args)\b"
    r"|torch\.ops\.\w+\._|from (torch|timm)[\w.]*\._|kineto_results"
)


def test_torch_has_a_packed_linear_product():
    if why_not("packed", torch.float32) is not None:
        pytest.skip("oneDNN packs no float32 here")
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    packed = torch_private.pack_linear_weight(weight)
    got = torch_private.packed_linear(x, packed, bias, "gelu")
    expected = nn.functional.gelu(nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_torch_counts_writes():
    tensor = torch.zeros(3)
    before = torch_private.version(tensor)
    tensor.add_(1)
    assert torch_private.version(tensor) == before + 1
    with torch.inference_mode():
        assert torch_private.version(torch.zeros(3)) == 0


def test_a_stream_can_be_kept_busy(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "_sleep", waited.append, raising=True)
    torch_private.gpu_sleep(100)
    assert waited == [100]


def test_modules_hold_their_parts_in_dictionaries():
    norm = nn.Sequential(nn.BatchNorm1d(3))
    assert list(torch_private.submodules(norm)) == ["0"]
    names = {name for held in torch_private.tensors(norm[0]) for name in held}
    assert {"weight", "bias", "running_mean"} <= names


def test_the_profiler_tells_of_allocations(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        torch.zeros(1000)
    assert [size for _, size in torch_private.profiled_allocations(profile)] == [4000, -4000]


def test_fake_tensors_take_no_memory():
    with torch_private.fake_tensors():
        assert torch.empty(1 << 40).shape == (1 << 40,)


def test_timm_embeds_positions_and_notes_arguments():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=1, num_heads=2
    )
    patches = model.patch_embed(torch.zeros(1, 3, 32, 32))
    assert timm_private.add_positions(model, patches).shape == (1, 5, 12)
    timm_private.note_arguments(model, {"img_size": 32})
    assert timm_private.noted_arguments(model)["img_size"] == 32


def test_they_stand_in_these_files_alone():
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path in HOMES:
            continue
        source = path.read_text()
        strings = {
            line
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            for line in range(node.lineno, node.end_lineno + 1)
        }
        for number, line in enumerate(source.splitlines(), start=1):
            code = line.split("#")[0]
            own = re.search(r"self\._(version|parameters|buffers|modules)\b", code)
            if number not in strings and not own and PRIVATE.search(code):
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert not found
