"""Recipes: each method trains, keeps its heads and policy, and cannot be mixed up."""

import pytest
import torch
from torch.nn import functional as F

import lgvit_fast
from lgvit_fast.cli import main
from lgvit_fast.training import Stage1Config, TrainConfig, train
from lgvit_fast.training.recipes import RECIPES
from lgvit_fast.training.stages import Stage1


@pytest.mark.parametrize("name", RECIPES)
def test_each_method_trains_and_answers(name, small_config):
    config = small_config(recipe=name, stage="both", stage1={"epochs": 1, "warmup_epochs": 0})
    recipe = RECIPES[name]
    assert config.stage1.strategy == recipe.strategy
    assert config.stage == recipe.stages
    result = train(config)
    assert set(result.stages) == ({"stage1", "stage2"} if name == "lgvit" else {"stage1"})
    model = lgvit_fast.LGViT.from_pretrained(list(result.stages.values())[-1].best)
    assert type(model.policy) is type(recipe.policy)
    if recipe.heads != "lgvit":
        assert {spec.head for spec in model.exits} == {recipe.heads}
    batch = torch.randn(4, 1, 16, 16)
    expected = model.infer(batch)
    got = lgvit_fast.Engine(model)(batch)
    assert got.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_self_distillation_weighs_whole_divergences_and_spares_the_teacher():
    torch.manual_seed(0)
    model = lgvit_fast.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=3, embed_dim=16, num_heads=2,
        num_classes=50, exits=[1, 2], heads="linear",
    ).eval()  # fmt: skip
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 49])
    config = Stage1Config(strategy="self_distillation", alpha=0.4)
    loss, _ = Stage1(model, config)(images, targets, update=0)

    outputs = model.forward_exits(images)
    teacher = torch.softmax(outputs.final.detach() / 2, -1)
    expected = F.cross_entropy(outputs.final, targets)
    for logits in outputs.exits:
        divergence = F.kl_div(torch.log_softmax(logits / 2, -1), teacher, reduction="batchmean")
        expected = expected + (0.6 * F.cross_entropy(logits, targets) + 0.4 * 4 * divergence) / 2
    torch.testing.assert_close(loss, expected)

    got = torch.autograd.grad(loss, model.backbone.head.weight)[0]
    wanted = torch.autograd.grad(
        F.cross_entropy(outputs.final, targets), model.backbone.head.weight
    )
    torch.testing.assert_close(got, wanted[0])


def test_stage2_without_local_and_global_heads(small_config):
    config = small_config(
        heads=["linear"],
        stage="both",
        stage1={"epochs": 1, "warmup_epochs": 0},
        stage2={"epochs": 1, "strategy": "distillation"},
    )
    assert config.heads == "linear"
    result = train(config)
    assert result.stages["stage2"].updates > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_that_followed_a_recipe_comes_back(name):
    config = TrainConfig(recipe=name)
    again = TrainConfig.from_dict(config.to_dict())
    assert again == config


def test_patience_is_never_more_than_the_exits():
    assert RECIPES["pabee"].policy_for(3) == lgvit_fast.Patience(3)
    assert RECIPES["pabee"].policy_for(8) == lgvit_fast.Patience(7)
    assert RECIPES["pcee"].policy_for(1) == lgvit_fast.PatientConfident(0.5, 1)
    assert RECIPES["sdn"].policy_for(1) == lgvit_fast.Confidence()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"recipe": "bee"}, "did you mean pabee", id="unknown"),
        pytest.param(
            {"recipe": "sdn", "heads": "vit_ee"}, "'vit_ee' belongs to vit_ee", id="heads"
        ),
        pytest.param(
            {"recipe": "sdn", "stage1": Stage1Config(strategy="alternating")},
            "'alternating' belongs to berxit",
            id="strategy",
        ),
        pytest.param({"recipe": "pabee", "stage": "2"}, "stage is '2'", id="stage"),
        pytest.param({"recipe": "lgvit", "heads": ["linear"]}, "sdn, pabee", id="lgvit-heads"),
    ],
)
def test_mixed_up_recipes_name_what_would_work(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_the_command_line_takes_a_recipe(tmp_path, capsys):
    code = main(["train", "--recipe", "sdn", "--heads", "vit_ee", "--output", str(tmp_path)])
    assert code == 2
    assert "belongs to vit_ee" in capsys.readouterr().err
