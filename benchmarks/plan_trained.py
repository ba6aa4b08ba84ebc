"""Planned exits on a trained model: time and accuracy beside all exits, and the plan's prediction.

    lgvit-fast demo --out demo-output
    python -m benchmarks.plan_trained demo-output/model

The model decides by itself on the held-out digits, in full batches; the plan is made from where they
leave, without looking at what they are.
"""

import argparse
import sys
import time

import numpy as np
import torch

import lgvit_fast
from lgvit_fast.data import Digits, InputSpec


def digits(model: lgvit_fast.LGViT, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    source = Digits(split, InputSpec.of(model.backbone))
    batch = source.__getitems__([(0, i) for i in range(len(source))])
    return batch[0], batch[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model trained on digits")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threshold", type=float, help="of a confidence policy, not the saved one")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    model = lgvit_fast.LGViT.from_pretrained(args.model)
    if args.threshold is not None:
        model.policy = lgvit_fast.Confidence(args.threshold)
    images, targets = digits(model, "validation")
    full = len(images) - len(images) % args.batch_size
    images, targets = images[:full], targets[:full]
    exits = torch.cat([model.infer(part).exit_index for part in images.split(256)])
    histogram = torch.bincount(exits, minlength=len(model.exits) + 1).tolist()
    plan = lgvit_fast.plan_exits(model, histogram, args.batch_size)

    engines = {
        "all exits": lgvit_fast.Engine(model, args.batch_size, "torch"),
        "planned exits": lgvit_fast.Engine(model, args.batch_size, "torch", exits=plan.exits),
        "no exits": lgvit_fast.Engine(model, args.batch_size, "torch", exits=()),
    }
    predicted = (plan.seconds_with_all, plan.seconds, plan.seconds_dense)
    times: dict[str, list[float]] = {name: [] for name in engines}
    right = {}
    for turn in range(args.rounds + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            answers = [engine(part).prediction for part in images.split(args.batch_size)]
            if turn:
                times[name].append(time.perf_counter() - start)
            right[name] = (torch.cat(answers) == targets).double().mean().item()
    print(f"policy {model.policy}; leaving at {histogram}; planned exits {list(plan.exits)}")
    print("| engine | accuracy | ms/image | predicted |")
    print("| --- | ---: | ---: | ---: |")
    for (name, taken), guess in zip(times.items(), predicted, strict=True):
        median = 1000 * np.median(taken) / len(images)
        print(f"| {name} | {100 * right[name]:.1f} % | {median:.3f} | {1000 * guess:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
