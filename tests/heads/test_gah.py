"""The global head's value projection is folded where that is smaller; the logits stay the same."""

from itertools import product

import pytest
import torch

from lgvit_fast import _extension, ops
from lgvit_fast.heads import ExitHead, ExitSpec
from lgvit_fast.ops.exit_step import ExitRule, RuleKind
from tests.helpers import randomize

RULE = ExitRule(RuleKind.CONFIDENCE, 0.5)
WIDTH, HEADS = 64, 8  # one matrix up to 64 / 7 = 9 classes
BACKENDS = [
    "torch",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(
            _extension.why_missing(torch.device("cpu")) is not None, reason="no compiled kernels"
        ),
    ),
]


def make_head(stride, classes, class_tokens=1, pool="subsample"):
    torch.manual_seed(0)
    spec = ExitSpec(1, f"gah_{stride}")
    head = ExitHead(spec, WIDTH, classes, class_tokens, class_tokens, HEADS, pool)
    randomize(head)
    return head.eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["subsample", "average"])
@pytest.mark.parametrize("classes", [2, 9, 10, 100, 1000])
@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (13, 15), (14, 14), (3, 24)], ids=str)
def test_logits_are_those_of_the_training_form(grid, classes, pool, backend):
    for stride, class_tokens in product((1, 2, 3), (0, 1, 2)):
        head = make_head(stride, classes, class_tokens, pool)
        tokens = torch.randn(2, class_tokens + grid[0] * grid[1], WIDTH)
        head.prepare(torch.float32)
        state = torch.zeros(2, 2, dtype=torch.int32)
        with torch.no_grad(), ops.backend(backend):
            expected, _ = head(tokens, grid)
            logits = head.step(tokens, grid, RULE, state).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("classes", "vectors"), [(2, HEADS), (9, HEADS), (10, 1), (1000, 1)])
def test_the_smaller_form_is_folded(classes, vectors):
    head = make_head(2, classes)
    head.prepare(torch.float32)
    folded = head.folded
    assert folded.weight.shape == (classes, (vectors + 1) * WIDTH)
    values = folded.perception.values
    assert (values is None) == (vectors == HEADS)
    found = folded.weight.numel() + (0 if values is None else values.numel())
    one_matrix, two_steps = classes * HEADS * WIDTH, WIDTH**2 + classes * WIDTH
    assert found == min(one_matrix, two_steps) + classes * WIDTH  # and the class token's part


def test_a_head_of_one_attention_head_is_always_one_matrix():
    torch.manual_seed(0)
    head = ExitHead(ExitSpec(1, "gah_1"), WIDTH, 1000, 0, 0, num_heads=1).eval()
    head.prepare(torch.float32)
    assert head.folded.perception.values is None and head.folded.weight.shape == (1000, WIDTH)
