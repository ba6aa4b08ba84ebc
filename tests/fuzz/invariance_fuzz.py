"""An image's answer does not depend on its batch, the engine or the stream that gives it."""

from __future__ import annotations

import random
from functools import cache

import torch

import lgvit_fast
from lgvit_fast import Engine, LGViT, Policy, stream
from tests.helpers import images, tiny_model, tiny_swin

ENGINES = ({"graphs": False}, {"graphs": "eager"}, {"graphs": "eager", "speculate": True})


def run(count: int, seed: int) -> dict[str, int]:
    """Answer `count` random batches every way; AssertionError where two ways differ."""
    draw = random.Random(seed)
    answered = 0
    for _ in range(count):
        answered += _case(draw)
    return {"cases": count, "images": answered}


def _case(draw: random.Random) -> int:
    model, size = _model(draw.randrange(4))
    given = images(draw.choice((1, 2, 5, 9, 16)), (size, size), seed=draw.randrange(1 << 30))
    policy = _policy(draw, len(model.exits))
    whole = model.infer(given, policy)
    cut = draw.randrange(len(given) + 1)
    parts = [model.infer(part, policy) for part in (given[:cut], given[cut:]) if len(part)]
    joined = lgvit_fast.Inference.cat(parts)
    engine = Engine(model, max_batch=draw.choice((3, 8, 16)), **draw.choice(ENGINES))
    others = [joined, engine(given, policy)]
    for other in others:
        _same(model, whole, other.logits, other.exit_index)
    answers = sorted(stream(engine, given.split(4), 4, policy=policy), key=lambda a: a.index)
    assert [answer.index for answer in answers] == list(range(len(given)))
    streamed = torch.stack([answer.logits for answer in answers])
    left = torch.tensor([answer.exit_index for answer in answers])
    _same(model, whole, streamed, left)
    return len(given)


def _same(
    model: LGViT, whole: lgvit_fast.Inference, logits: torch.Tensor, exit_index: torch.Tensor
) -> None:
    assert torch.equal(whole.exit_index, exit_index)
    torch.testing.assert_close(logits, whole.logits, atol=1e-4, rtol=1e-4)


@cache
def _model(number: int) -> tuple[LGViT, int]:
    if number == 3:
        return tiny_swin(exits=4), 48
    return tiny_model(seed=number, exits=(None, [1, 2, 5], [2, 3, 4, 5])[number]), 32


def _policy(draw: random.Random, exits: int) -> Policy:
    return draw.choice(
        (
            lgvit_fast.Confidence(round(draw.uniform(0.2, 1), 3)),
            lgvit_fast.Confidence([round(draw.uniform(0.2, 1), 3) for _ in range(exits)]),
            lgvit_fast.Entropy(round(draw.uniform(0, 2), 3)),
            lgvit_fast.Patience(draw.randint(1, 4)),
            lgvit_fast.PatientConfident(round(draw.uniform(0.5, 2), 3), draw.randint(1, 3)),
        )
    )
