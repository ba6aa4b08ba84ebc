"""Threads that share an engine take turns: each gets the answers of its own images."""

from __future__ import annotations

import random
import threading

import torch

from lgvit_fast import Confidence, Engine
from tests.helpers import images, tiny_model


def run(count: int, seed: int) -> dict[str, int]:
    """Make `count` engine calls from four threads; AssertionError where an answer is wrong."""
    draw = random.Random(seed)
    model = tiny_model(exits=[2, 3, 5])
    options = draw.choice(({"graphs": False}, {"graphs": "eager"}))
    engine, policy = Engine(model, max_batch=4, **options), Confidence(0.5)
    batches = [images(draw.randint(1, 6), seed=draw.randrange(1 << 30)) for _ in range(count)]
    answers = {}

    def work(first: int) -> None:
        for place in range(first, count, 4):
            answers[place] = engine(batches[place], policy)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, batch in enumerate(batches):
        expected = model.infer(batch, policy)
        assert torch.equal(answers[place].exit_index, expected.exit_index)
        torch.testing.assert_close(answers[place].logits, expected.logits, atol=1e-4, rtol=1e-4)
    return {"cases": count}
