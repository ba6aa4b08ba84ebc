"""The losses by themselves: strategies, layouts of any shape, soft targets."""

import math

import pytest
import torch
import torch.nn.functional as F

from lgvit_fast.heads import ExitSpec
from lgvit_fast.training.losses import (
    channel_divergence,
    cross_entropy,
    distillation,
    gram_distance,
    stage1_loss,
    stage2_losses,
)

LAYERS = (2, 5)
EXIT_CE = [torch.tensor(2.0), torch.tensor(3.0)]
FINAL_CE = torch.tensor(1.0)
EXIT_KD = [torch.tensor(0.5), torch.tensor(1.5)]
WEIGHTED = (2 * 2 + 5 * 3 + 8 * 1) / (2 + 5 + 8)


@pytest.mark.parametrize(
    ("strategy", "update", "expected"),
    [
        ("normal", 0, 2.0),
        ("normal", 1, 2.0),
        ("weighted", 0, WEIGHTED),
        ("alternating", 0, 1.0),
        ("alternating", 1, 2.0),
        ("alternating", 2, 1.0),
        ("alternating_weighted", 0, 1.0),
        ("alternating_weighted", 3, WEIGHTED),
        ("distillation", 0, 0.7 * 2.0 + 0.3 * 1.0),
        ("self_distillation", 0, 1.0 + 0.7 * 2.5 + 0.3 * 1.0),
        ("self_distillation", 1, 1.0 + 0.7 * 2.5 + 0.3 * 1.0),
    ],
)
def test_stage1_strategies(strategy, update, expected):
    loss = stage1_loss(EXIT_CE, FINAL_CE, LAYERS, 8, strategy, update, EXIT_KD)
    assert loss.item() == pytest.approx(expected)


def test_unknown_strategy_is_named():
    with pytest.raises(ValueError, match=r"strategy is 'sometimes', expected one of normal"):
        stage1_loss(EXIT_CE, FINAL_CE, LAYERS, 8, "sometimes")


@pytest.mark.parametrize("strategy", ["distillation", "self_distillation"])
def test_distillation_strategies_need_their_losses(strategy):
    with pytest.raises(ValueError, match=f"the {strategy} strategy needs exit_kd"):
        stage1_loss(EXIT_CE, FINAL_CE, LAYERS, 8, strategy)


def test_probability_targets_equal_class_targets():
    logits, targets = torch.randn(6, 5), torch.randint(5, (6,))
    soft = F.one_hot(targets, 5).float()
    torch.testing.assert_close(cross_entropy(logits, soft), cross_entropy(logits, targets))


def test_distillation_of_equal_logits_is_zero():
    logits = torch.randn(4, 7)
    assert distillation(logits, logits + 3).item() == pytest.approx(0, abs=1e-6)


def test_distillation_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    # softened at T = 2 the teacher says 3/4 and 1/4
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation(student, teacher, 2.0).item() == pytest.approx(4 * divergence / 2)


def test_gram_distance_ignores_scale_and_token_count():
    feature = torch.randn(3, 16, 8)
    doubled = torch.cat([feature, feature], dim=1) * 5
    assert gram_distance(doubled, feature).item() == pytest.approx(0, abs=1e-5)
    assert gram_distance(torch.randn(3, 9, 8), feature).item() > 1e-2


# --------------------------------------------------------------------- roles come from the layout

GRID, WIDTH, CLASSES, BATCH = (3, 5), 8, 4, 2


def features_of(exits, widths=None):
    torch.manual_seed(0)
    counts = [math.ceil(GRID[0] / e.stride) * math.ceil(GRID[1] / e.stride) for e in exits]
    widths = widths or [WIDTH] * len(exits)
    return [
        torch.randn(BATCH, n, c, requires_grad=True) for n, c in zip(counts, widths, strict=True)
    ]


def losses_of(heads, published=False, widths=None):
    exits = [ExitSpec(layer, head) for layer, head in enumerate(heads, start=1)]
    features = features_of(exits, widths)
    tokens = torch.randn(BATCH, GRID[0] * GRID[1], WIDTH)
    logits = [torch.randn(BATCH, CLASSES, requires_grad=True) for _ in exits]
    teacher, targets = torch.randn(BATCH, CLASSES), torch.randint(CLASSES, (BATCH,))
    losses = stage2_losses(
        logits, features, tokens, GRID, teacher, targets, exits, published=published
    )
    return losses, features, tokens


@pytest.mark.parametrize(
    ("heads", "hete", "homo_local", "homo_global"),
    [
        (["lph_full", "lph_full", "lph_light", "lph_light", "gah_2", "gah_2", "gah_3"], 4, 3, 2),
        (["lph_full", "gah_2"], 2, 0, 0),
        (["lph_full", "lph_light", "gah_1"], 3, 1, 0),
        (["lph_full", "lph_light", "lph_light"], 2, 2, 0),
        (["gah_1", "gah_2", "gah_4"], 2, 0, 2),
        (["gah_2", "lph_light", "gah_3", "lph_full"], 4, 1, 1),
        (["lph_light"], 1, 0, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_terms_follow_the_layout(heads, hete, homo_local, homo_global):
    losses, _, _ = losses_of(heads)
    assert len(losses.ce) == len(losses.kd) == len(heads)
    counts = len(losses.hete), len(losses.homo_local), len(losses.homo_global)
    assert counts == (hete, homo_local, homo_global)
    assert math.isfinite(losses.total().item())


def test_missing_roles_add_nothing():
    losses, _, _ = losses_of(["lph_full"])
    expected = 0.7 * losses.ce[0] + 0.3 * losses.kd[0] + 0.01 * losses.hete[0]
    assert losses.total().item() == pytest.approx(expected.item())


def test_hete_compares_with_the_tokens_that_the_head_reads():
    losses, features, tokens = losses_of(["lph_full", "gah_2"])
    whole = channel_divergence(features[0], tokens)
    strided = tokens.view(BATCH, *GRID, WIDTH)[:, ::2, ::2].reshape(BATCH, -1, WIDTH)
    torch.testing.assert_close(losses.hete[0], whole)
    torch.testing.assert_close(losses.hete[1], channel_divergence(features[1], strided))


def test_heads_of_another_width_are_left_out():
    losses, _, _ = losses_of(["lph_full", "lph_full", "gah_1", "gah_1"], widths=[4, 8, 8, 16])
    assert len(losses.hete) == 2  # of the last local and the first global head
    assert losses.homo_local == losses.homo_global == ()


def test_homogeneous_teachers_are_the_last_of_their_width():
    heads = ["lph_full", "lph_light", "gah_1", "gah_1", "gah_2"]
    losses, features, _ = losses_of(heads, widths=[4, 4, 8, 8, 16])
    assert len(losses.homo_local) == len(losses.homo_global) == 1
    torch.testing.assert_close(losses.homo_local[0], F.mse_loss(features[0], features[1]))
    torch.testing.assert_close(losses.homo_global[0], gram_distance(features[2], features[3]))


@pytest.mark.parametrize("published", [False, True], ids=["default", "published"])
def test_homogeneous_teachers_are_detached_unless_published(published):
    losses, features, _ = losses_of(["lph_full", "lph_light", "gah_1", "gah_2"], published)
    sum(losses.homo_local + losses.homo_global).backward()
    students, teachers = (features[0], features[2]), (features[1], features[3])
    assert all(feature.grad.any() for feature in students)
    assert [feature.grad is not None for feature in teachers] == [published, published]
