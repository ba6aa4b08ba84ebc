"""The model end to end: batched early exit, drop-in behaviour, inputs good and bad."""

import copy

import pytest
import timm
import torch

import lgvit_fast
from lgvit_fast import Confidence, Entropy, ExitSpec, Patience, PatientConfident, Replay
from lgvit_fast.checkpoints.files import load_weights, save_weights
from lgvit_fast.parameter_names import file_names, module_names
from tests.helpers import images, tiny_model, tiny_vit

POLICIES = [
    Confidence(0.35),
    Confidence([0.9, 0.6, 0.4, 0.3]),
    Entropy(0.7),
    Patience(2),
    PatientConfident(0.8, 2),
]

FAMILIES = {
    "vit": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "registers": {"reg_tokens": 4},
    "no-class-token": {"class_token": False, "global_pool": "avg"},
    "class-token-avg-pool": {"global_pool": "avg"},
    "attention-pool": {"class_token": False, "global_pool": "map"},
    "no-embed-class-pre-norm": {"no_embed_class": True, "pre_norm": True},
    "two-blocks": {"depth": 2},
    "rectangular": {"img_size": (16, 40)},
    "one-channel": {"in_chans": 1},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def dense(model, batch):
    with torch.no_grad():
        return model.backbone(batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_timm_when_nobody_leaves(family):
    options = FAMILIES[family]
    model = tiny_model(**options)
    size = options.get("img_size", (32, 32))
    batch = images(3, size, options.get("in_chans", 3))
    result = model.infer(batch, Confidence(1.0))
    assert result.exit_index.tolist() == [len(model.exits)] * 3
    assert result.exit_layer.tolist() == [model.num_blocks] * 3
    torch.testing.assert_close(result.logits, dense(model, batch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_leave_with_the_exits_own_logits(family):
    options = FAMILIES[family]
    model = tiny_model(**options)
    batch = images(7, options.get("img_size", (32, 32)), options.get("in_chans", 3))
    script = [index % (len(model.exits) + 1) for index in range(7)]
    result = model.infer(batch, Replay(script))
    with torch.no_grad():
        out = model.forward_exits(batch)
    every = torch.stack((*out.exits, out.final))
    expected = every[script, torch.arange(7)]
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)
    assert result.exit_index.tolist() == script
    layers = [*(spec.layer for spec in model.exits), model.num_blocks]
    assert result.exit_layer.tolist() == [layers[index] for index in script]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_same_answer_alone_and_in_a_batch_of_257(model, policy):
    if policy == POLICIES[1]:
        model = tiny_model(exits=4)
    batch = images(257)
    together = model.infer(batch, policy)
    assert len(set(together.exit_index.tolist())) > 2, "the batch must really spread over exits"
    alone = [model.infer(batch[i : i + 1], policy) for i in range(0, 257, 8)]
    assert [int(a.exit_index) for a in alone] == together.exit_index[::8].tolist()
    logits = torch.cat([a.logits for a in alone])
    torch.testing.assert_close(logits, together.logits[::8], atol=1e-4, rtol=0)


def test_order_of_the_batch_does_not_matter(model):
    batch = images(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    straight, shuffled = model.infer(batch, Entropy(1.6)), model.infer(batch[order], Entropy(1.6))
    assert torch.equal(shuffled.exit_index, straight.exit_index[order])
    torch.testing.assert_close(shuffled.logits, straight.logits[order], atol=1e-4, rtol=0)


def test_eval_forward_is_a_drop_in_classifier(model):
    batch = images(9)
    model.policy = Confidence(0.35)
    logits = model(batch)
    assert isinstance(logits, torch.Tensor)
    assert torch.equal(logits, model.infer(batch).logits)


def test_train_forward_gives_every_exit():
    model = tiny_model().train()
    out = model(images(4))
    assert [tuple(e.shape) for e in out.exits] == [(4, 7)] * len(model.exits)
    assert out.features is None
    (sum(e.sum() for e in out.exits) + out.final.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_features_and_last_tokens(model):
    out = model.forward_exits(images(2), features=True)
    assert [f.shape[1] for f in out.features] == [
        16 if spec.kind == "local" else (-(-4 // spec.stride)) ** 2 for spec in model.exits
    ]
    assert out.last_tokens.shape == (2, 16, 32)
    assert out.patch_grid == (4, 4)


def test_empty_batch(model):
    result = model.infer(images(0))
    assert result.logits.shape == (0, 7)
    assert result.exit_index.shape == result.exit_layer.shape == result.nonfinite.shape == (0,)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("policy", [Confidence(0.0), Entropy(50.0), Patience(1)], ids=repr)
def test_poisoned_image_runs_to_the_end_alone(model, policy, poison):
    batch = images(6)
    clean = model.infer(batch, policy)
    batch[2, 1, 5, 5] = poison
    result = model.infer(batch, policy)
    assert result.nonfinite.tolist() == [False, False, True, False, False, False]
    assert result.exit_index[2] == len(model.exits)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(result.exit_index[others], clean.exit_index[others])
    torch.testing.assert_close(result.logits[others], clean.logits[others], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(dtype):
    model = tiny_model().to(dtype)
    result = model.infer(images(5).to(dtype), Replay([0, 1, 2, 3, 9]))
    assert result.logits.dtype == dtype
    expected = tiny_model().infer(images(5), Replay([0, 1, 2, 3, 9])).logits
    assert (result.logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, dtype):
    script = Replay([0, 1, 2, 3, 9])
    with torch.autocast("cpu", dtype=dtype):
        result = model.infer(images(5), script)
        low = model.infer(images(5).to(dtype), script)
    expected = model.infer(images(5), script)
    assert result.exit_index.tolist() == low.exit_index.tolist() == expected.exit_index.tolist()
    assert (result.logits - expected.logits).abs().max() < 0.1 * expected.logits.abs().max()
    after = model.infer(images(5), script)
    assert torch.equal(after.logits, expected.logits), "autocast must leave nothing behind"


def test_layouts_of_the_input(model):
    batch = images(6)
    expected = model.infer(batch, Confidence(0.35))
    wide = images(12)
    wide[::2] = batch
    for given in (batch.to(memory_format=torch.channels_last), wide[::2]):
        assert not given.is_contiguous()
        result = model.infer(given, Confidence(0.35))
        assert torch.equal(result.exit_index, expected.exit_index)
        torch.testing.assert_close(result.logits, expected.logits, atol=1e-5, rtol=0)
    with torch.inference_mode():
        result = model.infer(batch, Confidence(0.35))
    assert torch.equal(result.logits, expected.logits)
    assert not result.logits.requires_grad


def test_input_is_left_alone(model):
    batch = images(8)
    before = batch.clone()
    model.infer(batch, Replay([0, 1] * 4))
    assert torch.equal(batch, before)


def test_dynamic_image_size():
    model = tiny_model(dynamic_img_size=True)
    for size in ((32, 32), (16, 48), (64, 24)):
        batch = images(3, size)
        result = model.infer(batch, Replay([0, 2, 9]))
        with torch.no_grad():
            out = model.forward_exits(batch)
        torch.testing.assert_close(result.logits[0], out.exits[0][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.logits[2], dense(model, batch)[2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="multiples of its 8 x 8"):
        model.infer(images(1, (33, 32)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: torch.randn(3, 32, 32), r"\(3, 32, 32\), expected \[B, 3", id="3d"),
        pytest.param(
            lambda: images(1, (32, 24)), "32 x 24 pixels, the model wants 32 x 32", id="size"
        ),
        pytest.param(lambda: images(1, channels=1), r"expected \[B, 3", id="channels"),
        pytest.param(lambda: images(1).double(), "float64, the model torch.float32", id="float64"),
        pytest.param(lambda: images(1).to(torch.uint8), "uint8", id="uint8"),
        pytest.param(lambda: images(1).to("meta"), "on meta, the model on cpu", id="device"),
        pytest.param(lambda: [1, 2], "list, expected a torch.Tensor", id="list"),
    ],
)
def test_bad_images(model, make, message):
    for call in (model, model.infer, model.forward_exits):
        with pytest.raises(ValueError, match=message):
            call(make())


def test_infer_wants_eval_mode():
    with pytest.raises(RuntimeError, match="eval"):
        tiny_model().train().infer(images(1))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (0.8, "expected a lgvit_fast policy"),
        (Confidence([0.5, 0.5]), "2 entries, the model has 4 exits"),
    ],
    ids=["number", "length"],
)
def test_bad_policy(model, policy, message):
    with pytest.raises(ValueError, match=message):
        model.policy = policy
    with pytest.raises(ValueError, match=message):
        model.infer(images(1), policy)


def test_replay_wants_its_batch(model):
    with pytest.raises(ValueError, match="scripts 3 images, the batch has 2"):
        model.infer(images(2), Replay([0, 0, 0]))


class TestConstruction:
    def test_state_dict_and_parameters_agree_on_names(self):
        backbone = tiny_vit()
        names = {f"backbone.{name}" for name in backbone.state_dict()}
        model = lgvit_fast.LGViT(backbone)
        state = model.state_dict()
        assert {k for k in state if not k.startswith("exit_heads.")} == names
        parameters = {*dict(model.named_parameters()), *dict(model.named_buffers())}
        assert set(state) <= parameters and set(dict(model.named_parameters())) <= set(state)

    def test_functional_call_and_averaging_work_on_these_names(self):
        model, other = tiny_model(seed=0), tiny_model(seed=1)
        answer = torch.func.functional_call(model, dict(other.state_dict()), (images(3),))
        torch.testing.assert_close(answer, other(images(3)), atol=1e-4, rtol=1e-4)
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        averaged.update_parameters(model)
        torch.testing.assert_close(averaged(images(3)), model(images(3)), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("rename", [module_names, file_names])
    def test_state_dicts_of_either_naming_are_loaded(self, rename):
        model, other = tiny_model(seed=0), tiny_model(seed=1)
        other.load_state_dict(rename(model.state_dict()))
        assert torch.equal(other.infer(images(4)).logits, model.infer(images(4)).logits)

    def test_files_keep_timm_names(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        held = load_weights(tmp_path / "model.safetensors")
        assert {k for k in held if not k.startswith("exit_heads.")} == set(tiny_vit().state_dict())
        save_weights(tmp_path / "model.safetensors", model.state_dict())  # the other naming
        again = lgvit_fast.LGViT.from_pretrained(tmp_path)
        assert torch.equal(again.infer(images(4)).logits, model.infer(images(4)).logits)

    def test_state_dict_inside_another_module(self):
        outer = torch.nn.Sequential(tiny_model())
        assert "0.backbone.blocks.0.attn.qkv.weight" in outer.state_dict()
        outer.load_state_dict(outer.state_dict())

    def test_missing_keys_are_reported(self):
        model = tiny_model()
        state = model.state_dict()
        del state["backbone.blocks.0.norm1.weight"]
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert missing == ["backbone.blocks.0.norm1.weight"]

    def test_deepcopy_is_independent(self):
        model = tiny_model()
        twin = copy.deepcopy(model)
        expected = model.infer(images(4)).logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(twin.infer(images(4)).logits, expected)

    def test_num_classes_makes_a_new_classifier(self):
        model = lgvit_fast.LGViT(tiny_vit(num_classes=0), num_classes=3)
        assert model.eval()(images(2)).shape == (2, 3)
        with pytest.raises(ValueError, match="num_classes"):
            lgvit_fast.LGViT(tiny_vit(num_classes=0))

    def test_follows_dtype_and_mode_of_the_wrapped_model(self):
        model = lgvit_fast.LGViT(tiny_vit().double().eval())
        assert not model.training
        assert model(images(1).double()).dtype == torch.float64

    def test_create_model_passes_timm_arguments_through(self):
        model = lgvit_fast.create_model(
            "vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, depth=5, exits=[1, 3]
        )
        assert (model.num_blocks, model.num_classes) == (5, 5)
        assert model.exits == (ExitSpec(1, "lph_full"), ExitSpec(3, "gah_2"))

    def test_unknown_name_suggests_others(self):
        with pytest.raises(ValueError, match="vit_bas"):
            lgvit_fast.create_model("vit_bass_patch16_224")

    def test_unsupported_architecture(self):
        with pytest.raises(ValueError, match="ResNet is not supported"):
            lgvit_fast.LGViT(timm.create_model("resnet10t"))

    def test_patch_dropout_is_refused(self):
        with pytest.raises(ValueError, match="patch_drop_rate"):
            lgvit_fast.LGViT(tiny_vit(patch_drop_rate=0.2))

    def test_width_must_suit_the_attention_heads(self):
        with pytest.raises(ValueError, match="num_heads=5"):
            lgvit_fast.LGViT(tiny_vit(), num_heads=5)


class TestTrainingHooks:
    def test_frozen_backbone_stays_in_eval_mode_without_gradients(self):
        model = tiny_model(proj_drop_rate=0.5)
        model.freeze_backbone()
        model.train()
        assert not any(module.training for module in model.backbone.modules())
        out = model(images(4))
        sum(e.sum() for e in out.exits).backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        assert all(p.grad is not None for p in model.exit_heads.parameters())
        model.freeze_backbone(False)
        assert model.backbone.training
        assert all(p.requires_grad for p in model.parameters())

    def test_layer_decay_groups_follow_depth(self):
        from timm.optim import param_groups_layer_decay

        model = tiny_model()
        undecayed_names = model.no_weight_decay()
        groups = param_groups_layer_decay(
            model, layer_decay=0.5, no_weight_decay_list=undecayed_names
        )
        scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        names = dict(model.named_parameters())
        first, last = (
            names["backbone.blocks.0.mlp.fc1.weight"],
            names["backbone.blocks.5.mlp.fc1.weight"],
        )
        assert scale[id(names["backbone.pos_embed"])] < scale[id(first)] < scale[id(last)] < 1
        assert scale[id(names["exit_heads.0.classifiers.0.weight"])] == 1
        undecayed = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        assert id(names["backbone.pos_embed"]) in undecayed

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        plain, recomputed = tiny_model().train(), tiny_model().train()
        recomputed.backbone.set_grad_checkpointing()
        for model in (plain, recomputed):
            model(images(2)).final.sum().backward()
        for ours, theirs in zip(plain.parameters(), recomputed.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


class TestPretrained:
    @pytest.mark.parametrize("policy", [Confidence(0.7), Entropy([0.1] * 4), Patience(3)], ids=repr)
    def test_round_trip(self, tmp_path, policy):
        model = tiny_model(reg_tokens=2, heads=["lph_light", "gah_1", "gah_2", "lph_full"])
        model.policy = policy
        model.save_pretrained(tmp_path)
        again = lgvit_fast.LGViT.from_pretrained(tmp_path)
        assert again.exits == model.exits
        assert again.policy == policy
        assert not again.training
        assert torch.equal(again.infer(images(5)).logits, model.infer(images(5)).logits)

    def test_backbone_not_made_by_name(self, tmp_path):
        build = lambda: timm.models.VisionTransformer(  # noqa: E731
            img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=4
        )
        model = lgvit_fast.LGViT(build()).eval()
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="give backbone="):
            lgvit_fast.LGViT.from_pretrained(tmp_path)
        again = lgvit_fast.LGViT.from_pretrained(tmp_path, backbone=build())
        assert torch.equal(again(images(2)), model(images(2)))

    def test_backbone_changed_by_hand_is_not_mistaken_for_the_original(self, tmp_path):
        backbone = tiny_vit()
        backbone.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + 64, 32))
        backbone.patch_embed.set_input_size((64, 64))
        lgvit_fast.LGViT(backbone).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="give backbone="):
            lgvit_fast.LGViT.from_pretrained(tmp_path)

    def test_other_shape_names_the_keys(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"pos_embed \(1, 17, 32\), expected"):
            lgvit_fast.LGViT.from_pretrained(tmp_path, backbone=tiny_vit(img_size=64))

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            lgvit_fast.LGViT.from_pretrained(tmp_path / "nowhere")

    def test_foreign_config(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(ValueError, match="format None"):
            lgvit_fast.LGViT.from_pretrained(tmp_path)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def test_compiled_model_gives_the_same_answers_and_sees_changes(self):
        model = tiny_model(exits=[1, 2], depth=3)
        compiled = torch.compile(model, backend="aot_eager")
        batch = images(9)
        for policy in (Confidence(0.35), Entropy(0.7)):
            model.policy = policy
            torch.testing.assert_close(compiled(batch), model(batch), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            model.exit_heads[0].classifiers[0].weight.mul_(3)
        torch.testing.assert_close(compiled(batch), model(batch), atol=1e-4, rtol=1e-4)

    def test_heads_and_decision_do_not_break_the_graph(self):
        model = tiny_model()
        model.prepare()
        tokens, policy = images(3), Confidence(0.35)
        for segment in model.segments:
            state = policy.start(3, tokens.device)
            compiled = torch.compile(segment, backend="aot_eager", fullgraph=True)
            with torch.no_grad():
                after, step = compiled(tokens, state, (32, 32), policy)
                _, expected = segment(tokens, state.clone(), (32, 32), policy)
            torch.testing.assert_close(step.logits, expected.logits, atol=1e-4, rtol=1e-4)
            tokens = after
