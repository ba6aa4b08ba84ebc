import copy
import gc
import pickle
import weakref

import pytest
import torch

import lgvit_fast
from lgvit_fast import Engine, LGViT, pack_
from lgvit_fast.ops.linear import PackedLinear
from tests.helpers import images, tiny_model, tiny_swin

POLICY = lgvit_fast.Replay([i % 4 for i in range(7)])
MAKERS = {"vit": lambda: tiny_model(exits=[2, 3, 5]), "swin": lambda: tiny_swin(exits=3)}


@pytest.mark.parametrize("name", MAKERS)
def test_a_packed_model_answers_the_same(name):
    model = MAKERS[name]()
    given = images(7, (32, 32) if name == "vit" else (48, 48))
    expected = model.infer(given, POLICY)
    assert pack_(model) is model
    assert any(isinstance(m, PackedLinear) for m in model.backbone.modules())
    for got in (model.infer(given, POLICY), Engine(model)(given, POLICY)):
        assert torch.equal(got.exit_index, expected.exit_index)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_the_plain_matrices_are_gone_and_an_engine_adds_none():
    model = tiny_model(exits=[2, 3, 5])
    plain = weakref.ref(model.backbone.blocks[0].mlp.fc1)
    engine = Engine(model)
    engine(images(2))  # an engine made before notices
    pack_(model)
    engine(images(2))
    gc.collect()
    assert plain() is None
    packed = engine.segments[0].adapter.model.blocks[0].mlp.fc1
    assert packed is model.backbone.blocks[0].mlp.fc1


def test_it_is_saved_as_a_plain_model(tmp_path):
    model = tiny_model(exits=[2, 3, 5])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.infer(images(7), POLICY).logits
    after = pack_(model).state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    model.save_pretrained(tmp_path)
    loaded = LGViT.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.infer(images(7), POLICY).logits, expected)


def test_copies():
    model = pack_(tiny_model(exits=[2, 3, 5]))
    expected = model.infer(images(7), POLICY).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.infer(images(7), POLICY).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_with_folded_heads_is_pickled(dtype):
    model, given = tiny_swin(exits=3).to(dtype), images(7, (48, 48)).to(dtype)
    expected = model.infer(given, POLICY).logits
    assert torch.equal(pickle.loads(pickle.dumps(model)).infer(given, POLICY).logits, expected)


def test_what_a_packed_model_refuses():
    state = tiny_model(exits=[2, 3, 5]).state_dict()
    model = pack_(tiny_model(exits=[2, 3, 5]))
    with pytest.raises(RuntimeError, match="train before packing"):
        model.train()
    model.eval()
    with pytest.raises(RuntimeError, match="load weights before packing"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="convert before packing"):
        model.bfloat16()


def test_what_cannot_be_packed():
    with pytest.raises(RuntimeError, match="eval"):
        pack_(tiny_model().train())
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        pack_(tiny_model().double())
