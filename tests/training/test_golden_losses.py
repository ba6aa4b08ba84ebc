"""Losses, gradients and BatchNorm buffers of both stages against the published code's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lgvit_fast
from lgvit_fast.checkpoints.names import published_names, scatter
from lgvit_fast.parameter_names import file_names
from lgvit_fast.training import Stage1Config, Stage2Config
from lgvit_fast.training.losses import cross_entropy, distillation, stage1_loss, stage2_losses
from lgvit_fast.training.stages import Stage1, Stage2

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """The published numbers for one model, and that model."""

    def __init__(self, kind):
        self.numbers = json.loads((GOLDEN / f"{kind}_golden.json").read_text())
        self.arrays = np.load(GOLDEN / f"{kind}_golden.npz")
        self.images = self.array("images")[:8]
        self.labels = self.array("labels")[:8].long()
        is_swin = kind == "swin"
        self.layers = (4, 7, 10, 13, 16, 19, 22, 23) if is_swin else tuple(range(4, 12))
        self.num_blocks = 24 if is_swin else 12

    def array(self, name):
        return torch.from_numpy(self.arrays[name])

    def model(self):
        weights = GOLDEN / f"{self.numbers['kind']}_weights_fp16.safetensors"
        return lgvit_fast.load_published(weights, self.numbers["config"]).train()


@pytest.fixture(scope="module", params=["vit", "deit", "swin"])
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module", params=["vit", "deit"])
def columnar(request):
    """The models for which there is a published stage 2."""
    return Golden(request.param)


@pytest.fixture(scope="module")
def swin():
    return Golden("swin")


def gradients(model, loss):
    """Gradients by published name, as far as there are any."""
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = file_names(found)
    names = {k: sources for k, sources in published_names(model).items() if k in ours}
    return scatter(names, ours).get


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
    if entry not in golden.numbers["stage1"]:
        pytest.skip("the published Swin has no such strategy")
    strategy, update = STAGE1[entry]
    exits, final = golden.array("train/exit_logits"), golden.array("train/final_logits")
    loss = stage1_loss(
        [cross_entropy(logits, golden.labels) for logits in exits],
        cross_entropy(final, golden.labels),
        golden.layers,
        golden.num_blocks,
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


def test_stage1_distillation_has_the_published_loss(columnar):
    # the gradients differ by choice: our teacher is detached
    model = columnar.model()
    config = Stage1Config(strategy="distillation")
    loss, _ = Stage1(model, config)(columnar.images, columnar.labels, 0)
    assert loss.item() == pytest.approx(
        columnar.numbers["stage1"]["distillation"]["loss"], rel=1e-5
    )


def test_batchnorm_buffers_after_one_step(golden):
    model = golden.model()
    Stage1(model, Stage1Config())(golden.images, golden.labels, 0)
    state = file_names(model.state_dict())
    prefix = "train/bn_after_one_step/"
    ours = {source: key for key, (source, *_) in published_names(model).items()}
    names = [name for name in golden.arrays.files if name.startswith(prefix)]
    assert len(names) >= 3
    for name in names:
        buffer = state[ours[name.removeprefix(prefix)]]
        torch.testing.assert_close(buffer, golden.array(name), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ stage 2


def test_stage2_terms_in_parity_mode(columnar):
    model = columnar.model()
    losses = Stage2(model, Stage2Config(published=True)).losses(columnar.images, columnar.labels)
    terms = columnar.numbers["stage2"]["terms"]
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


def test_stage2_total_and_gradients_in_parity_mode(columnar):
    model = columnar.model()
    loss, _ = Stage2(model, Stage2Config(published=True))(columnar.images, columnar.labels, 0)
    numbers = columnar.numbers["stage2"]["distillation_LGViT"]
    assert loss.item() == pytest.approx(numbers["loss"], rel=1e-5)
    check_gradients(
        gradients(model, loss), numbers["grad_norms"], columnar.arrays, "stage2/lgvit_grad/"
    )


def test_stage2_published_teacher(columnar):
    model = columnar.model()
    objective = Stage2(model, Stage2Config(published=True))
    _, teacher = objective.outputs(columnar.images)
    expected = columnar.array("stage2/teacher_logits")
    torch.testing.assert_close(teacher, expected, rtol=0, atol=1e-4)
    assert not model.backbone.norm._forward_pre_hooks  # nothing is left on the model


def test_stage2_default_differs_from_the_published_form_where_it_should(columnar):
    """The teacher has the final norm, the Gram matrices are normalised; the rest is the same."""
    model = columnar.model()
    losses = Stage2(model, Stage2Config()).losses(columnar.images, columnar.labels)
    terms = columnar.numbers["stage2"]["terms"]
    assert [term.item() for term in losses.ce] == pytest.approx(terms["ce"], rel=1e-4)
    assert [term.item() for term in losses.homo_local] == pytest.approx(
        terms["homo_conv"], rel=1e-4
    )
    assert [term.item() for term in losses.kd] != pytest.approx(terms["kd"], rel=1e-2)
    assert all(0 <= term.item() <= 2 for term in losses.homo_global)


def test_swin_stage2_distillation_under_the_published_teacher(swin):
    """There the teacher has a norm that nothing trained, so it is given here."""
    model = swin.model()
    model.freeze_backbone()
    outputs = model.forward_exits(swin.images, features=True)
    torch.testing.assert_close(
        torch.stack(outputs.exits), swin.array("stage2/exit_logits"), rtol=0, atol=1e-4
    )
    losses = stage2_losses(
        outputs.exits,
        outputs.features,
        outputs.last_tokens,
        outputs.patch_grid,
        swin.array("stage2/teacher_logits"),
        swin.labels,
        model.exits,
    )
    terms, numbers = swin.numbers["stage2"]["terms"], swin.numbers["stage2"]["distillation"]
    assert [term.item() for term in losses.ce] == pytest.approx(terms["ce"], rel=1e-4)
    assert [term.item() for term in losses.kd] == pytest.approx(terms["kd"], rel=1e-4)
    loss = losses.distillation(swin.layers)
    assert loss.item() == pytest.approx(numbers["loss"], rel=1e-5)
    check_gradients(gradients(model, loss), numbers["grad_norms"], swin.arrays, None)


def test_swin_stage2_teacher_is_the_model_with_its_own_norm(swin):
    model = swin.model()
    stage = Stage2(model, Stage2Config(strategy="distillation"))
    losses = stage.losses(swin.images, swin.labels)
    terms = swin.numbers["stage2"]["terms"]
    assert [x.item() for x in losses.kd] == pytest.approx(terms["kd_with_swin_layernorm"], rel=1e-4)
    loss, _ = stage(swin.images, swin.labels, 0)
    assert loss.item() == pytest.approx(terms["total_with_swin_layernorm"], rel=1e-5)


def test_swin_has_the_whole_stage2(swin):
    model = swin.model()
    losses = Stage2(model, Stage2Config()).losses(swin.images, swin.labels)
    # By width 32, 64 and 128: one local head at 32 and three at 64, three global at 64 and one at 128.
    assert (len(losses.homo_local), len(losses.homo_global)) == (2, 2)
    assert len(losses.hete) == 1  # the last global head alone has the width of the last block
    losses.total().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("exit_heads"), name
    with pytest.raises(ValueError, match="no stage 2 of LGViT for Swin"):
        Stage2(model, Stage2Config(published=True))
