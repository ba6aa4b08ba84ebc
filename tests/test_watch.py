"""What was made from weights follows them, however they were written."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lgvit_fast import Engine
from lgvit_fast.watch import Watch
from tests.helpers import images, tiny_model

CHANGES = {
    "in place": lambda p: p.detach().add_(0.5),
    "through .data": lambda p: p.data.add_(0.5),
    "one row through .data": lambda p: p.data[-1].add_(1.0),
    "through numpy": lambda p: p.detach().numpy().__iadd__(0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_full_look_sees_every_write(change):
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    for parameter in (*module.parameters(), module[1].running_mean.add_(1)):
        watch = Watch(module)
        assert not watch.changed()
        CHANGES[change](parameter)
        assert watch.changed()


def test_partial_looks_see_everything_within_the_bound():
    module = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    for share in (0.01, 0.1, 0.3):
        for parameter in module.parameters():
            watch = Watch(module)
            parameter.data.add_(1)
            looks = next(i for i in range(1, 1000) if watch.changed(share))
            assert looks <= math.ceil(1 / share)


def test_only_what_was_copied_is_read():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    watch = Watch(module, [module[1]])
    module[0].weight.data.add_(1)
    assert not watch.changed()
    module[1].weight.data.add_(1)
    assert watch.changed()
    watch = Watch(module, [module[1]])
    with torch.no_grad():
        module[0].weight.add_(1)
    assert watch.changed()  # by its version


def test_copies_of_a_watch():
    module = nn.Linear(4, 4)
    watch = Watch(module)
    for twin in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert twin.changed() in (True, False)


PARTS = {
    "block": lambda model: model.backbone.blocks[0].mlp.fc1.weight,
    "head": lambda model: next(p for p in model.exit_heads[0].parameters() if p.dim() == 2),
}


@pytest.mark.parametrize("mode", ["plain", "inference mode"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", PARTS)
def test_engine_and_infer_answer_for_the_weights_as_they_are(part, change, mode):
    given = images(32)
    with torch.inference_mode(mode == "inference mode"):
        model = tiny_model(exits=[2, 3, 5])
        engine = Engine(model)
        engine(given), model.infer(given)
        CHANGES[change](PARTS[part](model))
        got, plain = engine(given), model.infer(given)  # 32 images: every byte was looked at
        model.train(), model.eval()
        expected = model.infer(given)
    torch.testing.assert_close(plain.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(got.exit_index, expected.exit_index)


def test_engine_sees_a_write_within_its_bound_and_at_once_when_told():
    model, one = tiny_model(exits=[2, 3, 5]), images(1)
    engine = Engine(model)
    for told in (False, True):
        engine(one)
        before = engine.segments
        model.backbone.blocks[2].mlp.fc2.weight.data[3].add_(1)
        if told:
            engine.refresh()
        else:
            for _ in range(32):
                engine(one)
        assert engine.segments is not before
        torch.testing.assert_close(
            engine(one).logits, model.infer(one).logits, rtol=1e-3, atol=1e-4
        )
