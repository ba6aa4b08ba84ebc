"""Parity with the published code on its own numbers, and its checkpoints' bad cases."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lgvit_fast
from tests.helpers import GOLDEN, golden, golden_model, golden_policy

KINDS = ("vit", "deit")
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
    for index, feature in enumerate(out.features):
        close(feature[:2], arrays[f"eval/feature/{index}"])


def test_intermediate_tokens_match(kind):
    arrays = golden(kind)[1]
    model = golden_model(kind)
    with torch.no_grad():
        tokens = model.adapter.embed(torch.tensor(arrays["images"][:1]))
        close(tokens[0], arrays["eval/embedding_img0"])
        for block in range(model.num_blocks):
            tokens = model.adapter.blocks(tokens, block, block + 1)
            close(tokens[0], arrays["eval/block_out_img0"][block])


@pytest.mark.parametrize(("kind", "entry"), STRATEGIES)
def test_exits_match_exactly(kind, entry):
    arrays = golden(kind)[1]
    result = golden_model(kind).infer(torch.tensor(arrays["images"]), golden_policy(entry))
    assert result.exit_index.tolist() == arrays[f"{entry['name']}/exit_index"].tolist()
    assert result.exit_layer.tolist() == entry["exit_layer"]
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


class TestBadCheckpoints:
    weights = staticmethod(lambda: load_file(GOLDEN / "vit_weights_fp16.safetensors"))
    config = golden("vit")[0]["config"]

    def test_unknown_key_is_named(self):
        with pytest.raises(ValueError, match=r"deit\.encoder\.surprise"):
            lgvit_fast.load_published({**self.weights(), "deit.encoder.surprise": torch.ones(1)})

    def test_missing_key_is_named(self):
        weights = self.weights()
        del weights["deit.encoder.layer.3.output.dense.bias"]
        with pytest.raises(ValueError, match=r"blocks\.3\.mlp\.fc2\.bias"):
            lgvit_fast.load_published(weights, self.config)

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
