"""The exact inference form equals the training form in eval mode, for every head and shape."""

import pytest
import torch

from lgvit_fast.heads import ExitHead, ExitSpec
from lgvit_fast.ops.exit_step import ExitRule, RuleKind
from tests.helpers import randomize

RULE = ExitRule(RuleKind.CONFIDENCE, 0.5)


def make_head(kind, width=32, num_classes=5, prefix=1, class_tokens=1, **options):
    torch.manual_seed(0)
    head = ExitHead(ExitSpec(1, kind), width, num_classes, prefix, class_tokens, **options)
    randomize(head)
    return head.eval()


def blank_state(batch):
    return torch.tensor([0, -1], dtype=torch.int32).repeat(batch, 1)


@pytest.mark.parametrize("kind", ["lph_full", "lph_light", "gah_1", "gah_2", "gah_3"])
@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (13, 15), (14, 14), (3, 24)], ids=str)
@pytest.mark.parametrize(("prefix", "class_tokens"), [(0, 0), (1, 1), (2, 2), (5, 1)])
@pytest.mark.parametrize("norm", [False, True], ids=["mean", "norm"])
def test_forms_agree_in_float64(kind, grid, prefix, class_tokens, norm):
    head = make_head(kind, prefix=prefix, class_tokens=class_tokens, norm=norm).double()
    tokens = torch.randn(3, prefix + grid[0] * grid[1], 32, dtype=torch.float64)
    head.prepare(torch.float64)
    with torch.no_grad():
        logits, feature = head(tokens, grid)
    step = head.step(tokens, grid, RULE, blank_state(3))
    torch.testing.assert_close(step.logits, logits, atol=1e-10, rtol=1e-10)
    stride = head.perception.stride if kind.startswith("gah") else 1
    assert feature.shape == (3, -(-grid[0] // stride) * -(-grid[1] // stride), 32)


@pytest.mark.parametrize("kind", ["lph_full", "gah_2"])
def test_average_pooling_keeps_partial_windows(kind):
    head = make_head(kind, pool="average").double()
    tokens = torch.randn(2, 1 + 5 * 7, 32, dtype=torch.float64)
    head.prepare(torch.float64)
    with torch.no_grad():
        logits, _ = head(tokens, (5, 7))
    step = head.step(tokens, (5, 7), RULE, blank_state(2))
    torch.testing.assert_close(step.logits, logits, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["lph_full", "lph_light", "gah_2"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
@pytest.mark.parametrize("norm", [False, True], ids=["mean", "norm"])
def test_dtypes(kind, dtype, tolerance, norm):
    head = make_head(kind, norm=norm)
    tokens = torch.randn(3, 1 + 16, 32).to(dtype)
    with torch.no_grad():
        expected, _ = head.double()(tokens.double(), (4, 4))
    head.to(dtype).prepare(dtype)
    step = head.step(tokens, (4, 4), RULE, blank_state(3))
    assert step.logits.dtype == dtype
    error = (step.logits.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance


@pytest.mark.parametrize("kind", ["lph_full", "gah_2"])
@pytest.mark.parametrize("norm", [False, True], ids=["mean", "norm"])
def test_strided_tokens(kind, norm):
    head = make_head(kind, norm=norm)
    head.prepare(torch.float32)
    wide = torch.randn(6, 40, 64)
    tokens = wide[::2, 3:20, ::2]
    expected = head.step(tokens.contiguous(), (4, 4), RULE, blank_state(3)).logits
    step = head.step(tokens, (4, 4), RULE, blank_state(3))
    torch.testing.assert_close(step.logits, expected, atol=1e-5, rtol=1e-5)


class TestFoldedWeights:
    tokens = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))

    def logits(self, head):
        head.prepare(torch.float32)
        return head.step(self.tokens, (4, 4), RULE, blank_state(2)).logits

    def test_kept_while_nothing_changes(self):
        head = make_head("lph_full")
        self.logits(head)
        folded = head.folded
        self.logits(head)
        assert head.folded is folded

    @pytest.mark.parametrize("change", ["parameter", "buffer", "load_state_dict", "replaced"])
    def test_follow_a_change(self, change):
        head = make_head("lph_full")
        before = self.logits(head)
        with torch.no_grad():
            if change == "parameter":
                head.perception.pointwise1.weight.mul_(2)
            elif change == "buffer":
                head.perception.norm1.running_mean.add_(1)
            elif change == "load_state_dict":
                head.load_state_dict({k: v * 2 for k, v in head.state_dict().items()})
            else:
                head.classifiers[0].weight = torch.nn.Parameter(torch.ones(5, 32))
        with torch.no_grad():
            expected, _ = head(self.tokens, (4, 4))
        after = self.logits(head)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)

    def test_dropped_in_train_mode(self):
        head = make_head("gah_2")
        self.logits(head)
        assert head.train().folded is None

    def test_step_without_prepare_says_so(self):
        with pytest.raises(RuntimeError, match="prepare"):
            make_head("gah_2").step(self.tokens, (4, 4), RULE, blank_state(2))


def test_train_mode_batchnorm_sees_all_tokens():
    head = make_head("lph_light").train()
    tokens = torch.randn(4, 17, 32)
    head(tokens, (4, 4))
    hidden = torch.nn.functional.gelu(head.perception.pointwise1(tokens[:, 1:])).flatten(0, 1)
    norm = head.perception.norm1
    reference = make_head("lph_light").perception.norm1
    expected = reference.running_mean * 0.9 + hidden.mean(0) * 0.1
    torch.testing.assert_close(norm.running_mean, expected)
