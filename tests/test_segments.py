import copy

import pytest
import torch

from tests.helpers import images, tiny_model


@pytest.fixture(scope="module")
def model():
    model = tiny_model(exits=[1, 3, 4])
    model.prepare()
    return model


def run(model, batch):
    """Every segment by hand, nobody leaving: the inputs of each segment and its logits."""
    tokens, state = batch, torch.zeros(len(batch), 2, dtype=torch.int32)
    for segment in model.segments:
        given = tokens
        tokens, step = segment(given, state, (32, 32))
        yield segment, given, tokens, step


@torch.no_grad()
def test_segments_in_a_row_are_the_model(model):
    batch = images(5)
    expected = model.forward_exits(batch)
    logits = [step.logits for *_, step in run(model, batch)]
    for got, want in zip(logits, (*expected.exits, expected.final), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_segments_share_weights_but_add_none_to_the_state_dict(model):
    assert not [name for name in model.state_dict() if name.startswith("segments")]
    own = {id(p) for p in model.parameters()}
    held = [p for segment in model.segments for p in segment.parameters()]
    assert {id(p) for p in held} <= own
    assert len({id(p) for p in held}) == len(held), "segments overlap"


def test_segments_of_a_copy_belong_to_the_copy(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin.infer(images(2)).logits.abs().max() == 0
    assert model.infer(images(2)).logits.abs().max() > 0


@torch.no_grad()
def test_each_segment_compiles_whole(model):
    for segment, given, tokens, step in run(model, images(3)):
        compiled = torch.compile(segment, backend="eager", fullgraph=True)
        got_tokens, got = compiled(given, torch.zeros(3, 2, dtype=torch.int32), (32, 32))
        torch.testing.assert_close(got_tokens, tokens)
        torch.testing.assert_close(got.logits, step.logits)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:A model attribute")
def test_each_segment_exports_for_any_batch_with_its_own_weights_only(model):
    dim = torch.export.Dim("batch", min=1, max=512)
    for segment, given, tokens, step in run(model, images(3)):
        program = torch.export.export(
            segment,
            (given, torch.zeros(3, 2, dtype=torch.int32), (32, 32)),
            dynamic_shapes=({0: dim}, {0: dim}, (None, None)),
        )
        assert len(program.state_dict) <= len(segment.state_dict())
        state = torch.zeros(6, 2, dtype=torch.int32)
        got_tokens, got = program.module()(torch.cat((given, given)), state, (32, 32))
        torch.testing.assert_close(got_tokens[:3], tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.logits[3:], step.logits, atol=1e-5, rtol=1e-5)
