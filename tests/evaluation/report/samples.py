"""Rows and a whole report made up, to test what is said of them without measuring anything."""

import torch

from lgvit_fast.certificate import Certificate
from lgvit_fast.clock import Spread
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.evaluation import Recording, candidates, measure, sweep
from lgvit_fast.evaluation.report import LeftOut, Report, Row, Way, verdicts
from lgvit_fast.evaluation.report.make import Sample
from lgvit_fast.policies import Confidence, to_dict

LAYERS = (2, 4, 6)


def row(engine="eager", precision="float32", early=False, rival="", *, ms, drop=0, images=1000):
    """A row; `ms` is of batch 1 or by batch size, `drop` in tenths of a point of 1000 images."""
    times = ms if isinstance(ms, dict) else {1: ms}
    return Row(
        way=Way(engine, precision, early, rival),
        images=images,
        correct=900 * images // 1000 - drop,
        losses=max(drop, 0),
        gains=max(-drop, 0),
        ms={size: Spread(value, 0.98 * value, 1.02 * value) for size, value in times.items()},
        layer_ratio=2.0 if early else 1.0,
    )


def rows():
    """Early exit pays: the numbers of the documentation's example."""
    return [
        row(ms={1: 20.0, 32: 10.0}),
        row("onnxruntime", ms={1: 17.0, 32: 9.0}),
        row("onnxruntime", early=True, ms={1: 10.0, 32: 5.0}, drop=4),
        row("onnxruntime", "int8", ms={1: 10.6, 32: 7.0}, drop=9),
        row("onnxruntime", "int8", True, ms={1: 5.9, 32: 4.0}, drop=10),
        row(rival="vit_small", ms={1: 12.0, 32: 6.0}, drop=40),
    ]


def recording(images=120, classes=5):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(images) % classes
    logits = torch.randn(len(LAYERS), images, classes, generator=generator)
    logits += torch.tensor([2.0, 3.0, 4.0])[:, None, None] * torch.eye(classes)[targets]
    return Recording(logits, targets, LAYERS)


def make(names=("ant", "bee", "cat", "dog", "elk"), file="photo.png", **changes):
    """A report; `names` of the classes, `file` of each image."""
    kept, policy = recording(), Confidence(0.8)
    chosen = measure(kept, policy)
    certificate = Certificate(
        goal="max_drop", limit=1.0, bound=1.0, confidence=0.95, policy=to_dict(policy),
        layers=LAYERS, num_classes=5, images=1000, selection_images=1000, method="a test", seed=0,
        exit_counts=tuple(round(1000 * share) for share in chosen.shares),
        data="0" * 64, date="2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    noise = torch.Generator().manual_seed(1)
    pictures = torch.randn(12, 3, 32, 40, generator=noise)
    samples = tuple(
        Sample(picture, file, place % 5, (place + (place % 4 == 0)) % 5, place % 3)
        for place, picture in enumerate(pictures)
    )
    machine = {
        "processor": "a processor", "cores": 2, "threads": 2, "gpus": [], "python": "3.11",
        "instructions": ["avx2"], "lgvit_fast": "0", "torch": "2", "timm": "1",
    }  # fmt: skip
    parts = {
        "name": "a model", "data": "some photos", "notes": (), "recording": kept,
        "heads": ("lph_full", "gah_2"), "class_names": tuple(names), "chosen": chosen,
        "points": tuple(sweep(kept, candidates("confidence", 2, 5))), "certificate": certificate,
        "samples": samples, "spec": InputSpec(3, (32, 40), (0.5,) * 3, (0.5,) * 3),
        "rows": tuple(rows()), "left_out": (LeftOut(Way("openvino"), "not installed"),),
        "verdicts": tuple(verdicts(rows())), "tolerance": 1.0, "rounds": 5, "timed": 64,
        "machine": machine,
    }  # fmt: skip
    return Report(**{**parts, **changes})
