"""Random damage to every kind of file that is read: each must load, or end in a ValueError.

`python -m tests.fuzz.files_fuzz 20000 1` runs a long campaign and prints its counts.
"""

import copy
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

import lgvit_fast
from lgvit_fast.checkpoints import export_published, files, load_published
from lgvit_fast.training import TrainConfig
from lgvit_fast.training.checkpoint import Checkpoint
from lgvit_fast.training.identity import describe_model, load_stage1
from tests.helpers import tiny_model

ALLOWED = (ValueError, FileNotFoundError, IsADirectoryError)
ODD = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, float("nan"), "", "x",
    "/etc/passwd", "file:///etc/passwd", [], [[]], [1, 2], [0] * 600, {}, {"a": 1},
]  # fmt: skip
KEYS = ["", "checkpoint_path", "pretrained", "pretrained_cfg_overlay", "img_size", "depth", "name"]


def change_json(value, rng):
    """A copy of a nested value with one entry replaced, removed, added or moved."""
    value = copy.deepcopy(value)
    places = [(value, key) for key in _keys(value)]
    for container, key in places:
        places += [(container[key], inner) for inner in _keys(container[key])]
    if not places:
        return rng.choice(ODD)
    container, key = rng.choice(places)
    what = rng.randrange(4)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[rng.choice(KEYS)] = rng.choice(ODD)
    elif what == 2:
        container[key] = copy.deepcopy(rng.choice(places)[0])
    else:
        container[key] = copy.deepcopy(rng.choice(ODD))
    return value


def change_bytes(data, rng, first=None):
    """Bytes with a few flipped, cut off, doubled or overwritten; in the first so many if given."""
    data, end = bytearray(data), first or len(data)
    what = rng.randrange(4)
    if what == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif what == 1:
        del data[rng.randrange(end) :]
    elif what == 2:
        start = rng.randrange(end)
        data[start : start + rng.randint(1, 64)] = rng.randbytes(rng.randint(0, 64))
    else:
        start = rng.randrange(end)
        data[start:start] = data[start : start + rng.randint(1, 200)]
    return bytes(data)


def _keys(value):
    if isinstance(value, dict):
        return list(value)
    return range(len(value)) if isinstance(value, list) else ()


class Samples:
    """One whole file of each kind, and for each kind a way to damage it and to read it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.model = tiny_model()
        self.model.class_names = list("abcdefg")
        self.model.save_pretrained(self.folder / "saved")
        self.config = files.load_json(self.folder / "saved" / "config.json")
        self.weights = (self.folder / "saved" / "model.safetensors").read_bytes()
        tensors, self.settings = export_published(self.model)
        torch.save(tensors, self.folder / "published.bin")
        self.published = (self.folder / "published.bin").read_bytes()
        torch.save(tensors, self.folder / "old.bin", _use_new_zipfile_serialization=False)
        self.old = (self.folder / "old.bin").read_bytes()
        self.state = {"model": self.model.state_dict(), "ema": None, "progress": {"epoch": 1}}
        self.facts = {"stage": "stage1", "model": describe_model(self.model)}
        Checkpoint(self.state, self.facts).save(self.folder / "checkpoint")
        self.checkpoint = (self.folder / "checkpoint").read_bytes()

    def config_json(self, rng):
        """config.json of a saved model."""
        place = self.folder / "config json"
        place.mkdir(exist_ok=True)
        text = json.dumps(change_json(self.config, rng)).encode()
        (place / "config.json").write_bytes(text if rng.random() < 0.9 else change_bytes(text, rng))
        (place / "model.safetensors").write_bytes(self.weights)
        lgvit_fast.LGViT.from_pretrained(place)

    def weights_file(self, rng):
        """model.safetensors of a saved model: its header more often than its data."""
        length = 8 + int.from_bytes(self.weights[:8], "little")
        first = length if rng.random() < 0.7 else None
        (self.folder / "saved" / "model.safetensors").write_bytes(
            change_bytes(self.weights, rng, first)
        )
        lgvit_fast.LGViT.from_pretrained(self.folder / "saved")

    def weights_header(self, rng):
        """model.safetensors whose header is json still, without checksums, and wrong."""
        length = int.from_bytes(self.weights[:8], "little")
        header = json.loads(self.weights[8 : 8 + length])
        del header["__metadata__"]["crc32"]
        text = json.dumps(change_json(header, rng)).encode()
        (self.folder / "saved" / "model.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + self.weights[8 + length :]
        )
        lgvit_fast.LGViT.from_pretrained(self.folder / "saved")

    def checkpoint_bytes(self, rng):
        """A training checkpoint with other bytes."""
        (self.folder / "checkpoint").write_bytes(change_bytes(self.checkpoint, rng))
        load_stage1(self.folder / "checkpoint", self.model)

    def checkpoint_state(self, rng):
        """A training checkpoint of the right format with another state and other facts."""
        path, tensors = self.folder / "checkpoint", {}
        path.write_bytes(self.checkpoint)
        tensors, header = files.read_weights(path)
        part = rng.choice(["state", "facts"])
        header[part] = json.dumps(change_json(json.loads(header[part]), rng))
        del header["crc32"]
        files.save_weights(path, tensors, header)
        load_stage1(path, self.model)

    def published_bin(self, rng):
        """A pickled state dict of either format, with other bytes."""
        data = rng.choice([self.published, self.old])
        path = self.folder / "published.bin"
        path.write_bytes(change_bytes(data, rng, rng.choice([None, 2000, 20_000])))
        load_published(path, self.settings)

    def published_config(self, rng):
        """The settings beside a pickled state dict."""
        path = self.folder / "published.bin"
        path.write_bytes(self.published)
        (self.folder / "settings.json").write_text(json.dumps(change_json(self.settings, rng)))
        load_published(path, self.folder / "settings.json")

    def run_config(self, rng):
        """config.json of a training run."""
        path = self.folder / "run.json"
        path.write_text(
            json.dumps(change_json(TrainConfig(model_kwargs={"depth": 4}).to_dict(), rng))
        )
        TrainConfig.load(path)


KINDS = (
    "config_json", "weights_file", "weights_header", "checkpoint_bytes", "checkpoint_state",
    "published_bin", "published_config", "run_config",
)  # fmt: skip


def run(count: int, seed: int) -> dict[str, int]:
    """Read `count` damaged files; `failures` is to be 0."""
    found = Counter(cases=count, loaded=0, refused=0, failures=0)
    for outcome, number in outcomes(count, seed).items():
        _, what, *_ = outcome.split()
        found["failures" if what == "escaped" else what] += number
        if what == "escaped":
            print(f"files fuzz, seed {seed}: {outcome}", file=sys.stderr)
    return dict(found)


def outcomes(count: int, seed: int) -> dict[str, int]:
    """Read `count` damaged files.

    Returns:
        How many there were of each outcome: "KIND loaded", "KIND refused", and "KIND escaped as TYPE"
        for every exception that a caller need not expect (there must be none).
    """
    found = Counter()
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(folder)
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            try:
                getattr(samples, kind)(random.Random(f"{seed} {number}"))
            except ALLOWED:
                found[f"{kind} refused"] += 1
            except Exception as error:
                found[f"{kind} escaped as {type(error).__name__} (number {number})"] += 1
            else:
                found[f"{kind} loaded"] += 1
    return dict(found)


if __name__ == "__main__":
    for outcome, times in sorted(run(int(sys.argv[1]), int(sys.argv[2])).items()):
        print(f"{times:8} {outcome}")
