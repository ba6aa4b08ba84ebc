"""The rivals' heads: what each computes, in both forms, on every kind of backbone."""

import pytest
import torch
from torch.nn import functional as F

import lgvit_fast
from lgvit_fast.heads import ExitHead, ExitSpec
from lgvit_fast.heads.layout import LAYOUTS, resolve_exits
from lgvit_fast.ops.exit_step import ExitRule, RuleKind
from tests.helpers import images, randomize, tiny_model, tiny_swin

PLAIN = LAYOUTS[1:]
RULE = ExitRule(RuleKind.PATIENCE, patience=1)
GRID = (4, 5)


def make(kind, prefix=1, class_tokens=1, norm=False):
    torch.manual_seed(0)
    head = ExitHead(ExitSpec(1, kind), 32, 5, prefix, class_tokens, norm=norm)
    randomize(head)
    return head.double().eval()


def tokens_for(prefix):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, prefix + 20, 32, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("kind", [*PLAIN, "lph_full", "gah_2"])
@pytest.mark.parametrize(
    ("prefix", "class_tokens", "norm"),
    [(1, 1, False), (2, 2, False), (5, 1, False), (0, 0, False), (0, 0, True)],
    ids=["vit", "deit", "registers", "no-class-token", "swin"],
)
@torch.no_grad()
def test_inference_form_is_the_training_form(kind, prefix, class_tokens, norm):
    head, tokens = make(kind, prefix, class_tokens, norm), tokens_for(prefix)
    logits, feature = head(tokens, GRID)
    assert logits.shape == (3, 5)
    assert feature.shape[::2] == (3, 32)
    head.prepare(torch.float64)
    state = torch.tensor([0, -1], dtype=torch.int32).repeat(3, 1)
    step = head.step(tokens, GRID, RULE, state)
    torch.testing.assert_close(step.logits, logits, atol=1e-10, rtol=1e-10)
    assert step.leave.all()
    assert state[:, 1].tolist() == logits.argmax(-1).tolist()


def test_which_heads_have_an_inference_form():
    assert make("mlp").fused
    assert make("lph_light").fused
    assert make("lph_light", 0, 0, norm=True).fused
    assert make("gah_2", 0, 0, norm=True).fused
    assert not make("mlp", 0, 0, norm=True).fused
    assert not any(make(kind).fused for kind in ("linear", "vit_ee", "conv", "attention"))


@torch.no_grad()
def test_linear_reads_the_class_token_through_a_tanh_layer():
    head, tokens = make("linear"), tokens_for(1)
    pooler, classifier = head.readout.pooler, head.classifiers[0]
    torch.testing.assert_close(head(tokens, GRID)[0], classifier(torch.tanh(pooler(tokens[:, 0]))))


@torch.no_grad()
def test_linear_of_a_distilled_model_averages_two_votes_on_normalised_tokens():
    head, tokens = make("linear", 2, 2), tokens_for(2)
    normed = head.readout.norm(tokens)
    votes = [head.classifiers[i](normed[:, i]) for i in range(2)]
    torch.testing.assert_close(head(tokens, GRID)[0], (votes[0] + votes[1]) / 2)


@torch.no_grad()
def test_linear_without_class_token_reads_the_normalised_mean():
    head, tokens = make("linear", 0, 0, norm=True), tokens_for(0)
    expected = head.classifiers[0](head.readout.norm(tokens).mean(1))
    torch.testing.assert_close(head(tokens, GRID)[0], expected)


@torch.no_grad()
def test_conv_is_a_convolution_on_the_map():
    head, tokens = make("conv"), tokens_for(1)
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, GRID)
    hidden = F.gelu(head.perception.conv(grid)).flatten(2)
    expected = head.perception.norm(hidden).transpose(1, 2)
    torch.testing.assert_close(head(tokens, GRID)[1], expected)


@torch.no_grad()
def test_attention_is_that_of_torch():
    head, tokens = make("attention"), tokens_for(1)
    reference = torch.nn.MultiheadAttention(32, 8, batch_first=True).double()
    perception = head.perception
    reference.in_proj_weight.copy_(perception.qkv.weight)
    reference.in_proj_bias.copy_(perception.qkv.bias)
    reference.out_proj.load_state_dict(perception.proj.state_dict())
    x = tokens[:, 1:]
    torch.testing.assert_close(head(tokens, GRID)[1], reference(x, x, x)[0])


def test_block_head_has_the_ratio_asked_for():
    assert make("vit_ee").perception.block.mlp.fc1.out_features == 4 * 32
    assert make("vit_ee_6").perception.block.mlp.fc1.out_features == 6 * 32


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("build", [tiny_model, tiny_swin], ids=["vit", "swin"])
@torch.no_grad()
def test_a_layout_by_name_runs_like_any_other(kind, build, tmp_path):
    model = build(heads=kind, exits=3)
    assert [spec.head for spec in model.exits] == [kind] * 3
    batch = images(6, model.backbone.patch_embed.img_size)
    out = model.forward_exits(batch)
    thresholds = [float(x.softmax(-1).amax(-1).median()) for x in out.exits]
    result = model.infer(batch, lgvit_fast.Confidence(thresholds))
    assert len(set(result.exit_index.tolist())) > 1
    every = torch.stack((*out.exits, out.final))
    expected = every[result.exit_index, torch.arange(6)]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = lgvit_fast.LGViT.from_pretrained(tmp_path).infer(
        batch, lgvit_fast.Confidence(thresholds)
    )
    assert torch.equal(again.logits, result.logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lph_ful", "did you mean 'lph_full'"),
        ("vitee", "did you mean 'vit_ee'"),
        ("linear_2", "expected"),
        ("gah", "gah_r"),
    ],
)
def test_unknown_heads_name_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_exits(None, name, 12)


def test_attention_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=5 must be positive and divide the width 32"):
        tiny_model(heads="attention", num_heads=5)
    tiny_model(heads="mlp", num_heads=5)  # has none
