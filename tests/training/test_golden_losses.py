"""Losses, gradients and BatchNorm buffers of both stages against the published code's numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lgvit_fast
from lgvit_fast.training import Stage1Config, Stage2Config
from lgvit_fast.training.losses import cross_entropy, distillation, stage1_loss
from lgvit_fast.training.stages import Stage1, Stage2

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = (4, 5, 6, 7, 8, 9, 10, 11)

# published parameter name -> ours, for a ViT and a DeiT (query, key and value are one matrix in timm)
RENAMES = [
    (r"deit\.embeddings\.cls_token", "cls_token"),
    (r"deit\.embeddings\.distillation_token", "dist_token"),
    (r"deit\.embeddings\.position_embeddings", "pos_embed"),
    (r"deit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"deit\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"deit\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"deit\.encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"deit\.encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"deit\.encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"deit\.encoder\.highway\.(\d+)\.mlp\.qkv\.", r"exit_heads.\1.perception.qkv."),
    (r"deit\.encoder\.highway\.(\d+)\.mlp\.conv1\.0\.", r"exit_heads.\1.perception.pointwise1."),
    (r"deit\.encoder\.highway\.(\d+)\.mlp\.conv1\.2\.", r"exit_heads.\1.perception.norm1."),
    (r"deit\.encoder\.highway\.(\d+)\.mlp\.proj_bn\.", r"exit_heads.\1.perception.depthwise_norm."),
    (r"deit\.encoder\.highway\.(\d+)\.mlp\.conv2\.0\.", r"exit_heads.\1.perception.pointwise2."),
    (r"deit\.encoder\.highway\.(\d+)\.mlp\.conv2\.1\.", r"exit_heads.\1.perception.norm2."),
    (r"deit\.encoder\.highway\.([01])\.mlp\.proj\.", r"exit_heads.\1.perception.depthwise."),
    (r"deit\.encoder\.highway\.(\d+)\.mlp\.proj\.", r"exit_heads.\1.perception.proj."),
    (r"deit\.encoder\.highway\.(\d+)\.(cls_)?classifier\.", r"exit_heads.\1.classifiers.0."),
    (r"deit\.encoder\.highway\.(\d+)\.distillation_classifier\.", r"exit_heads.\1.classifiers.1."),
    (r"deit\.layernorm\.", "norm."),
    (r"(cls_)?classifier\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
]
SPLIT = re.compile(r"deit\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)")


class Golden:
    """The published numbers for one model, and that model."""

    def __init__(self, kind):
        self.numbers = json.loads((GOLDEN / f"{kind}_golden.json").read_text())
        self.arrays = np.load(GOLDEN / f"{kind}_golden.npz")
        self.images = self.array("images")[:8]
        self.labels = self.array("labels")[:8].long()

    def array(self, name):
        return torch.from_numpy(self.arrays[name])

    def model(self):
        weights = GOLDEN / f"{self.numbers['kind']}_weights_fp16.safetensors"
        return lgvit_fast.load_published(weights, self.numbers["config"]).train()


@pytest.fixture(scope="module", params=["vit", "deit"])
def golden(request):
    return Golden(request.param)


def gradients(model, loss):
    """Gradients by published name, as far as there are any."""
    loss.backward()
    # the state dict hides the prefix of the backbone's own names
    ours = {
        name.removeprefix("backbone."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }

    def find(published):
        split = SPLIT.fullmatch(published)
        if split:
            joined = ours.get(f"blocks.{split[1]}.attn.qkv.{split[3]}")
            part = ("query", "key", "value").index(split[2])
            return None if joined is None else joined.chunk(3)[part]
        for pattern, name in RENAMES:
            if re.match(pattern, published):
                return ours.get(re.sub(pattern, name, published, count=1))
        raise KeyError(published)

    return find


def check_gradients(find, norms, arrays, prefix):
    """Every gradient norm, and the few gradients that are stored whole, under `prefix`."""
    for name, expected in norms.items():
        gradient = find(name)
        if expected is None:
            assert gradient is None or not gradient.any(), name
        elif expected > 1e-5:  # below: zero but for rounding
            assert float(gradient.norm()) == pytest.approx(expected, rel=2e-4), name
    if prefix is None:
        return
    whole = [name for name in arrays.files if name.startswith(prefix)]
    assert whole
    for name in whole:
        expected = torch.from_numpy(arrays[name])
        gradient = find(name.removeprefix(prefix)).reshape(expected.shape)
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * scale, msg=name)


# ------------------------------------------------------------------------------------ stage 1

STAGE1 = {
    "normal": ("normal", 0),
    "weighted": ("weighted", 0),
    "alternating/even": ("alternating", 0),
    "alternating/odd": ("alternating", 1),
    "alternating_weighted/even": ("alternating_weighted", 0),
    "alternating_weighted/odd": ("alternating_weighted", 7),
    "distillation": ("distillation", 0),
}


@pytest.mark.parametrize("entry", STAGE1)
def test_stage1_loss_of_the_published_logits(golden, entry):
    strategy, update = STAGE1[entry]
    exits, final = golden.array("train/exit_logits"), golden.array("train/final_logits")
    loss = stage1_loss(
        [cross_entropy(logits, golden.labels) for logits in exits],
        cross_entropy(final, golden.labels),
        LAYERS,
        12,
        strategy,
        update,
        [distillation(logits, final) for logits in exits],
    )
    assert loss.item() == pytest.approx(golden.numbers["stage1"][entry]["loss"], rel=1e-6)


def test_per_exit_cross_entropy(golden):
    numbers = golden.numbers["stage1"]
    ours = [cross_entropy(x, golden.labels).item() for x in golden.array("train/exit_logits")]
    assert ours == pytest.approx(numbers["per_exit_ce"], rel=1e-6)
    final = cross_entropy(golden.array("train/final_logits"), golden.labels)
    assert final.item() == pytest.approx(numbers["final_ce"], rel=1e-6)


@pytest.mark.parametrize("entry", [entry for entry in STAGE1 if entry != "distillation"])
def test_stage1_loss_and_gradients_of_the_model(golden, entry):
    model = golden.model()
    strategy, update = STAGE1[entry]
    loss, _ = Stage1(model, Stage1Config(strategy=strategy))(golden.images, golden.labels, update)
    numbers = golden.numbers["stage1"][entry]
    assert loss.item() == pytest.approx(numbers["loss"], rel=1e-5)
    norms = numbers.get("grad_norms", numbers["key_grad_norms"])
    whole = "train/normal_grad/" if entry == "normal" else None
    check_gradients(gradients(model, loss), norms, golden.arrays, whole)


def test_stage1_distillation_has_the_published_loss(golden):
    # the gradients differ by choice: our teacher is detached
    model = golden.model()
    config = Stage1Config(strategy="distillation")
    loss, _ = Stage1(model, config)(golden.images, golden.labels, 0)
    assert loss.item() == pytest.approx(golden.numbers["stage1"]["distillation"]["loss"], rel=1e-5)


def test_batchnorm_buffers_after_one_step(golden):
    model = golden.model()
    Stage1(model, Stage1Config())(golden.images, golden.labels, 0)
    state = model.state_dict()
    prefix = "train/bn_after_one_step/deit.encoder.highway.0.mlp.conv1.2."
    names = [name for name in golden.arrays.files if name.startswith(prefix)]
    assert len(names) == 3
    for name in names:
        buffer = state["exit_heads.0.perception.norm1." + name.removeprefix(prefix)]
        torch.testing.assert_close(buffer, golden.array(name), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ stage 2


def test_stage2_terms_in_parity_mode(golden):
    model = golden.model()
    losses = Stage2(model, Stage2Config(published=True)).losses(golden.images, golden.labels)
    terms = golden.numbers["stage2"]["terms"]
    published_hete = [
        terms["hete"][name] for name in ("conv_first", "conv_last", "attn_first", "attn_last")
    ]
    for ours, expected in (
        (losses.ce, terms["ce"]),
        (losses.kd, terms["kd"]),
        (losses.hete, published_hete),
        (losses.homo_local, terms["homo_conv"]),
        (losses.homo_global, terms["homo_attn"]),
    ):
        assert [term.item() for term in ours] == pytest.approx(expected, rel=1e-4)


def test_stage2_total_and_gradients_in_parity_mode(golden):
    model = golden.model()
    loss, _ = Stage2(model, Stage2Config(published=True))(golden.images, golden.labels, 0)
    numbers = golden.numbers["stage2"]["distillation_LGViT"]
    assert loss.item() == pytest.approx(numbers["loss"], rel=1e-5)
    check_gradients(
        gradients(model, loss), numbers["grad_norms"], golden.arrays, "stage2/lgvit_grad/"
    )


def test_stage2_published_teacher(golden):
    model = golden.model()
    objective = Stage2(model, Stage2Config(published=True))
    objective.losses(golden.images, golden.labels)
    torch.testing.assert_close(
        objective._published_teacher(), golden.array("stage2/teacher_logits"), rtol=0, atol=1e-4
    )


def test_stage2_default_differs_from_the_published_form_where_it_should(golden):
    """The teacher has the final norm, the Gram matrices are normalised; the rest is the same."""
    model = golden.model()
    losses = Stage2(model, Stage2Config()).losses(golden.images, golden.labels)
    terms = golden.numbers["stage2"]["terms"]
    assert [term.item() for term in losses.ce] == pytest.approx(terms["ce"], rel=1e-4)
    assert [term.item() for term in losses.homo_local] == pytest.approx(
        terms["homo_conv"], rel=1e-4
    )
    assert [term.item() for term in losses.kd] != pytest.approx(terms["kd"], rel=1e-2)
    assert all(0 <= term.item() <= 2 for term in losses.homo_global)
