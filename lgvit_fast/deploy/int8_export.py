"""An export made int8, if that keeps the answers and gains time on this machine; else it is refused.

Both are measured: the answers of every exit on images of the user, and the time on every runtime that
is installed. What was seen stands in the manifest, or in the refusal.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lgvit_fast.clock import take_turns
from lgvit_fast.deploy.deployed import Deployed
from lgvit_fast.deploy.int8 import quantize
from lgvit_fast.deploy.manifest import Manifest, write_segment
from lgvit_fast.evidence import log_softmax
from lgvit_fast.machine import machine
from lgvit_fast.policies import Confidence, Entropy, PatientConfident, Policy
from lgvit_fast.runtimes.loaders import RUNTIMES, why_missing

__all__ = ["LEAST_AGREEMENT", "Int8Refused", "Measured", "convert", "refit"]

LEAST_AGREEMENT = 97.0  # percent of images that get the float32 class at full depth
_ROUNDS = {1: 15, 16: 3}  # timed batches by their size
_BATCH = 16  # of images that are answered untimed

# milliseconds an image: precision -> runtime -> batch size
Times = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Measured:
    """int8 beside float32 on one machine, no image leaving early.

    Attributes:
        images: how many were compared.
        agreement: percent of them that get the same class from both, of each exit and the final
            classifier.
        largest_difference: between two logits.
        milliseconds: an image: of float32 on every runtime that is installed, of int8 on the one that
            `Deployed` takes for it, by batch size.
        runtime: that one; the answers are from it.
    """

    images: int
    agreement: tuple[float, ...]
    largest_difference: float
    milliseconds: Times
    runtime: str

    @property
    def faults(self) -> list[str]:
        """Why int8 is not worth it here, a sentence part each; empty if it is."""
        found = []
        if self.agreement[-1] < LEAST_AGREEMENT:
            found.append(
                f"at full depth it gives {self.agreement[-1]:.1f} % of {self.images} images the class"
                f" that float32 gives them, expected at least {LEAST_AGREEMENT:g} %"
            )
        pairs = {
            size: (self.fastest("float32", size), self.fastest("int8", size)) for size in (1, 16)
        }
        if all(int8 >= full for full, int8 in pairs.values()):
            figures = ", ".join(
                f"{int8:.2f} ms an image in batches of {size} (float32 {full:.2f})"
                for size, (full, int8) in pairs.items()
            )
            found.append(f"it gains no time on this machine: {figures}")
        return found

    def fastest(self, precision: str, size: int) -> float:
        """Milliseconds an image on the runtime that is fastest in a precision."""
        return min(times[size] for times in self.milliseconds[precision].values())

    def to_dict(self) -> dict[str, Any]:
        """As json types, with the machine."""
        facts = machine()
        kept = ("processor", "instructions", "cores", "onnxruntime", "openvino")
        return {**dataclasses.asdict(self), "machine": {name: facts[name] for name in kept}}


class Int8Refused(ValueError):
    """An int8 export that would lose too many answers or no time. `measured` has the figures."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        faults = "; ".join(measured.faults)
        instructions = ", ".join(machine()["instructions"]) or "instruction sets unknown"
        super().__init__(
            f"int8 is refused: {faults} ({instructions}); force=True (--force) exports it all the same"
        )


def convert(
    folder: str | os.PathLike[str], output: Path, images: NDArray[np.float32], force: bool
) -> None:
    """Write the int8 form of a float32 export.

    Thresholds are fitted to the int8 logits (`refit`), and a certificate, which speaks of float32
    logits, is left out.

    Args:
        folder: a float32 export.
        output: an empty folder.
        images: `[n, C, H, W]` float32 to compare on.
        force: write it whatever is measured.

    Raises:
        Int8Refused: too few equal answers, or no gain.
        RuntimeError: no runtime is installed.
    """
    import onnx

    source = Manifest.load(folder)
    files = []
    for index, segment in enumerate(source.segments):
        proto = quantize(onnx.load_from_string(source.read(folder, index)))
        onnx.checker.check_model(proto, full_check=True)
        data = proto.SerializeToString(deterministic=True)
        files.append(write_segment(output / segment.file, data))
    made = dataclasses.replace(
        source, precision="int8", segments=tuple(files), certificate=None, int8={}
    )
    made.save(output)

    runtime = Deployed(output).runtime
    before, after = (_all_logits(Deployed(place, runtime), images) for place in (folder, output))
    same = before.argmax(-1) == after.argmax(-1)
    measured = Measured(
        images=len(images),
        agreement=tuple((100 * same.mean(-1)).tolist()),
        largest_difference=float(np.abs(before - after).max()),
        milliseconds=measure_times(folder, output, images[:16]),
        runtime=runtime,
    )
    if measured.faults and not force:
        raise Int8Refused(measured)
    policy = None if source.policy is None else refit(source.policy, before[:-1], after[:-1])
    notes = {
        "forced": bool(measured.faults),
        "policy": "fitted to the int8 logits" if policy != source.policy else "as in float32",
        "certificate": "left out: it was of float32 logits" if source.certificate else "none",
    }
    int8 = {**measured.to_dict(), **notes}
    dataclasses.replace(made, policy=policy, int8=int8).save(output)


def refit(policy: Policy, before: NDArray[np.float32], after: NDArray[np.float32]) -> Policy:
    """A policy whose thresholds let as many images pass at each exit as they did before.

    Policies without a threshold of confidence or entropy are given back as they are.

    Args:
        policy: for E exits.
        before: logits `[E, n, K]` that it was made for.
        after: logits of the same images to come.
    """
    if not isinstance(policy, Confidence | Entropy | PatientConfident):
        return policy
    by_confidence = isinstance(policy, Confidence)
    given = policy.threshold
    thresholds = [given] * len(before) if isinstance(given, int | float) else list(given)
    fitted = []
    for threshold, old, new in zip(thresholds, before, after, strict=True):
        if by_confidence:
            fitted.append(_matching(threshold, _confidence(old), _confidence(new), 0.0, 1.0))
        else:  # an image passes below the threshold
            lowest = -float(np.log(old.shape[-1]))
            fitted.append(-_matching(-threshold, -_entropy(old), -_entropy(new), lowest, 0.0))
    return policy if fitted == thresholds else dataclasses.replace(policy, threshold=tuple(fitted))


def _matching(
    threshold: float,
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    lowest: float,
    highest: float,
) -> float:
    """The threshold that as many of `after` are beyond as of `before` are beyond `threshold`."""
    count = int((before > threshold).sum())
    if int((after > threshold).sum()) == count:
        return threshold
    ranked = np.concatenate([[highest], np.sort(after)[::-1], [lowest]])
    return float(ranked[count] + ranked[count + 1]) / 2


def _confidence(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.exp(log_softmax(logits)).max(-1))


def _entropy(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    logs = log_softmax(logits)
    probabilities = np.exp(logs)
    return np.asarray(-np.where(probabilities > 0, probabilities * logs, 0).sum(-1))


def measure_times(
    float32: str | os.PathLike[str], int8: str | os.PathLike[str], images: NDArray[np.float32]
) -> Times:
    """Milliseconds an image that two exports take, in turns; see `Measured.milliseconds`.

    Args:
        float32: folder of an export.
        int8: folder of the same model in int8.
        images: `[16, C, H, W]`.
    """
    sides = [("float32", Deployed(float32, name)) for name in RUNTIMES if not why_missing(name)]
    sides.append(("int8", Deployed(int8)))
    found: dict[str, dict[str, dict[int, float]]] = {"float32": {}, "int8": {}}
    for size, rounds in _ROUNDS.items():
        work = {
            f"{precision} {deployed.runtime}": partial(deployed, images[:size], Policy())
            for precision, deployed in sides
        }
        turns = take_turns(work, torch.device("cpu"), rounds, warmup=1)
        for name, seconds in turns.items():
            precision, runtime = name.split()
            milliseconds = 1000 * float(np.median(seconds)) / size
            found[precision].setdefault(runtime, {})[size] = milliseconds
    return found


def _all_logits(deployed: Deployed, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits `[E + 1, n, K]` of every exit."""
    starts: Sequence[int] = range(0, len(images), _BATCH)
    return np.concatenate(
        [deployed.forward_exits(images[start : start + _BATCH]) for start in starts], axis=1
    )
