"""Engine and stream on every family of backbones: token layouts, widths and linear layers differ."""

import pytest
import timm
import torch

import lgvit_fast
from lgvit_fast.inference import Engine, stream
from tests.backbones.test_families import FAMILIES
from tests.helpers import images, randomize


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    name, options, size = FAMILIES[request.param]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    model = lgvit_fast.create_model(name, exits=[1, 2, 3], **{"num_classes": 7, **options})
    randomize(model)
    return model.eval(), images(6, size)


@pytest.mark.parametrize("graphs", [False, "eager"], ids=["plain", "buckets"])
def test_engine(family, graphs):
    model, batch = family
    script = lgvit_fast.Replay([2, 0, 3, 1, 0, 3])
    expected = model.infer(batch, script)
    got = Engine(model, 8, graphs=graphs)(batch, script)
    assert torch.equal(got.exit_layer, expected.exit_layer)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-3, rtol=1e-3)


def test_stream(family):
    model, batch = family
    script = lgvit_fast.Replay([2, 0, 3, 1, 0, 3])
    expected = model.infer(batch, script)
    answers = list(stream(model, batch.split(2), 4, policy=script))
    assert [a.exit_layer for a in answers] == expected.exit_layer.tolist()
    got = torch.stack([a.logits for a in answers])
    torch.testing.assert_close(got, expected.logits, atol=1e-3, rtol=1e-3)
