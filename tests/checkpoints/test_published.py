"""Parity with the published code on its own numbers, and its checkpoints' bad cases."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lgvit_fast
from lgvit_fast.checkpoints import export_published
from tests.helpers import (
    GOLDEN,
    golden,
    golden_model,
    golden_policy,
    images,
    tiny_model,
    tiny_swin,
)

KINDS = ("vit", "deit", "swin")
STRATEGIES = [
    pytest.param(kind, entry, id=f"{kind}-{entry['strategy']}-{entry['name'][-2:]}")
    for kind in KINDS
    for entry in golden(kind)[0]["strategies"]
]


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=atol, rtol=0)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


def test_eval_logits_and_features_match(kind):
    arrays = golden(kind)[1]
    with torch.no_grad():
        out = golden_model(kind).forward_exits(torch.tensor(arrays["images"]), features=True)
    close(torch.stack(out.exits), arrays["eval/exit_logits"])
    close(out.final, arrays["eval/final_logits"])
    model = golden_model(kind)
    for index, feature in enumerate(out.features):
        if kind == "swin":  # there the feature is what its classifier sees
            (feature,) = model.exit_heads[index].readout(feature, feature[:, :0])
        close(feature[:2], arrays[f"eval/feature/{index}"])


def test_intermediate_tokens_match(kind):
    arrays = golden(kind)[1]
    model = golden_model(kind)
    adapter, size = model.adapter, arrays["images"].shape[2:]
    with torch.no_grad():
        tokens = adapter.embed(torch.tensor(arrays["images"][:1]))
        close(adapter.to_tokens(tokens)[0], arrays["eval/embedding_img0"])
        for block in range(model.num_blocks):
            grid = adapter.patch_grid(size, block + 1)
            tokens = adapter.blocks(tokens, block, block + 1, grid)
            assert adapter.to_tokens(tokens).shape == (
                1,
                grid[0] * grid[1] + adapter.num_prefix_tokens,
                adapter.width(block + 1),
            )
            if kind != "swin":
                close(tokens[0], arrays["eval/block_out_img0"][block])
            elif f"eval/block_out_img0/{block}" in arrays:
                close(tokens[0].flatten(0, 1), arrays[f"eval/block_out_img0/{block}"])


@pytest.mark.parametrize(("kind", "entry"), STRATEGIES)
def test_exits_match_exactly(kind, entry):
    arrays = golden(kind)[1]
    result = golden_model(kind).infer(torch.tensor(arrays["images"]), golden_policy(entry))
    assert result.exit_index.tolist() == arrays[f"{entry['name']}/exit_index"].tolist()
    # The published code reports Swin's exits one layer too low.
    low = int(kind == "swin")
    assert result.exit_layer.tolist() == [x + low * (x < 24) for x in entry["exit_layer"]]
    close(result.logits, arrays[f"{entry['name']}/logits"])


def test_train_mode_logits_match(kind):
    arrays = golden(kind)[1]
    out = golden_model(kind).train()(torch.tensor(arrays["images"][:8]))
    close(torch.stack(out.exits), arrays["train/exit_logits"])
    close(out.final, arrays["train/final_logits"])


def test_reads_files_and_folders(tmp_path):
    facts, arrays = golden("vit")
    weights = load_file(GOLDEN / "vit_weights_fp16.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        model = lgvit_fast.load_published(source)
        with torch.no_grad():
            close(
                model.forward_exits(torch.tensor(arrays["images"])).final,
                arrays["eval/final_logits"],
            )


def test_survives_save_and_load(kind, tmp_path):
    """The published LayerNorm eps is not timm's; it must come back too."""
    model = golden_model(kind)
    model.save_pretrained(tmp_path)
    again = lgvit_fast.LGViT.from_pretrained(tmp_path)
    batch = torch.tensor(golden(kind)[1]["images"])
    assert torch.equal(model.infer(batch).logits, again.infer(batch).logits)


def test_shapes_are_enough(kind):
    """Without a configuration, but for the attention heads, which leave no trace in ViT's shapes."""
    facts, arrays = golden(kind)
    config = (
        {} if kind == "swin" else {"num_attention_heads": facts["config"]["num_attention_heads"]}
    )
    weights = load_file(GOLDEN / f"{kind}_weights_fp16.safetensors")
    model = lgvit_fast.load_published(weights, config)
    with torch.no_grad():
        out = model.forward_exits(torch.tensor(arrays["images"]))
    close(torch.stack(out.exits), arrays["eval/exit_logits"])


def test_heads_that_no_position_uses_are_left_out():
    facts, arrays = golden("swin")
    weights = load_file(GOLDEN / "swin_weights_fp16.safetensors")
    config = {**facts["config"], "position_exits": "[[], [2], [3, 6, 9], []]"}
    model = lgvit_fast.load_published(weights, config)
    with torch.no_grad():
        out = model.forward_exits(torch.tensor(arrays["images"]))
    close(torch.stack(out.exits), arrays["eval/exit_logits"][:4])


class TestRoundTrip:
    def test_of_the_golden_weights_is_exact(self, kind, tmp_path):
        facts, _ = golden(kind)
        weights = load_file(GOLDEN / f"{kind}_weights_fp16.safetensors")
        tensors, config = export_published(golden_model(kind), tmp_path)
        dropped = {k for k in weights if k not in tensors}
        assert all("index" in k or k.startswith(("layernorm.", "deit.pooler")) for k in dropped)
        for key, tensor in tensors.items():
            assert torch.equal(tensor, weights[key].to(tensor.dtype)), key
        assert config["highway_type"] == facts["config"]["highway_type"]
        again = lgvit_fast.load_published(tmp_path)
        assert again.exits == golden_model(kind).exits
        for key, tensor in golden_model(kind).state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key

    @pytest.mark.parametrize(
        "family", ["linear", "vit_ee", "conv", "attention", "gah_3", "lph_light"]
    )
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
    def test_of_every_head_type(self, name, family):
        self.check(
            tiny_model(name, exits=[1, 3, 4], heads=family, num_heads=8 if "gah" in family else 2)
        )

    @pytest.mark.parametrize("count", [2, 4, 6, 8])
    def test_of_every_number_of_exits(self, count):
        self.check(tiny_model(exits=count, depth=12))

    @pytest.mark.parametrize("heads", ["lgvit", "linear", "vit_ee_6"])
    def test_of_swin(self, heads):
        self.check(tiny_swin(heads=heads))

    def check(self, model):
        tensors, config = export_published(model)
        again = lgvit_fast.load_published(tensors, config)
        assert [spec.layer for spec in again.exits] == [spec.layer for spec in model.exits]
        assert [spec.head for spec in again.exits] == [spec.head for spec in model.exits]
        batch = images(3, again.backbone.patch_embed.img_size)
        eps = again.backbone.norm.eps
        assert eps == model.backbone.norm.eps
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key
        with torch.no_grad():
            ours, theirs = model.forward_exits(batch), again.forward_exits(batch)
        close(torch.stack(theirs.exits), torch.stack(ours.exits))
        close(theirs.final, ours.final)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            pytest.param({"heads": "mlp"}, "heads=.*mlp", id="head"),
            pytest.param(
                {"heads": ["gah_2", "lph_full"], "exits": [2, 3]}, "rows of 2, 4, 6", id="order"
            ),
            pytest.param({"pool": "average", "exits": 2}, "subsamples", id="pool"),
            pytest.param({"num_heads": 4, "exits": 2}, "num_heads=4", id="num-heads"),
            pytest.param({"img_size": (32, 48), "exits": 2}, "squares", id="not-square"),
            pytest.param(
                {"reg_tokens": 4, "class_token": False, "global_pool": "avg", "exits": 2},
                "no place",
                id="backbone",
            ),
        ],
    )
    def test_what_cannot_be_expressed_is_said(self, options, message):
        with pytest.raises(ValueError, match=message):
            export_published(tiny_model(**options))


class TestBadCheckpoints:
    weights = staticmethod(lambda: load_file(GOLDEN / "vit_weights_fp16.safetensors"))
    config = golden("vit")[0]["config"]

    def test_unknown_key_is_named(self):
        with pytest.raises(ValueError, match=r"deit\.encoder\.surprise"):
            lgvit_fast.load_published({**self.weights(), "deit.encoder.surprise": torch.ones(1)})

    @pytest.mark.parametrize(
        "name",
        [
            "deit.encoder.layer.3.output.dense.bias",
            "deit.encoder.layer.3.attention.attention.key.bias",
        ],
        ids=["single", "one-of-three"],
    )
    def test_missing_key_is_named(self, name):
        weights = self.weights()
        del weights[name]
        with pytest.raises(ValueError, match=f"missing: {name}"):
            lgvit_fast.load_published(weights, self.config)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"num_labels": 7}, "7 classes, classifier.weight has 10", id="classes"),
            pytest.param({"backbone": "DeiT"}, "'DeiT', the checkpoint holds a ViT", id="backbone"),
            pytest.param({"position_exits": "[4, 5]"}, "holds 8 exits", id="exits"),
            pytest.param({"position_exits": "[4, 5"}, "expected a list", id="no-list"),
            pytest.param({"image_size": 32}, "position_embeddings .*expected", id="image-size"),
        ],
    )
    def test_a_configuration_for_another_checkpoint(self, change, message):
        with pytest.raises(ValueError, match=message):
            lgvit_fast.load_published(self.weights(), {**self.config, **change})

    def test_without_exits_the_nearest_way_in_is_named(self):
        plain = {k: v for k, v in self.weights().items() if "highway" not in k}
        with pytest.raises(ValueError, match="from_huggingface"):
            lgvit_fast.load_published(plain)

    def test_other_architecture_is_refused(self):
        with pytest.raises(ValueError, match="no published LGViT"):
            lgvit_fast.load_published({"conv1.weight": torch.ones(1)})

    def test_code_in_a_pickle_is_never_run(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"weight": Attack()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            lgvit_fast.load_published(tmp_path / "pytorch_model.bin")
        assert not (tmp_path / "ran").exists()

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            lgvit_fast.load_published(tmp_path)
