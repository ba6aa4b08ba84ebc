"""The runtime side: a loop over the graphs of an exported model, in NumPy."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lgvit_fast.certificate import Certificate
from lgvit_fast.deploy.manifest import Manifest
from lgvit_fast.deploy.runtimes import Graph, SegmentOutput, load_runtime
from lgvit_fast.evidence import log_softmax
from lgvit_fast.exit_rules import ExitRule, ExitStep, RuleKind
from lgvit_fast.policies import Confidence, Policy

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Answers", "Deployed"]


@dataclass
class Answers:
    """One answer an image, in input order: `lgvit_fast.Inference` in NumPy.

    Attributes:
        logits: `[B, K]` float32 of the exit each image left at.
        exit_index: `[B]` int64, 0 to E - 1, E for the final classifier.
        exit_layer: `[B]` int64, the block after which it left, from 1.
        prediction: `[B]` int64, the class with the largest logit.
        confidence: `[B]` float32, the largest softmax probability; NaN where there is none.
        nonfinite: `[B]` bool, the image has a NaN or infinite pixel, or an exit or the final
            classifier met a NaN or +inf logit. No policy but a scripted one lets such an image leave
            at the exit where that happened.
    """

    logits: NDArray[np.float32]
    exit_index: NDArray[np.int64]
    exit_layer: NDArray[np.int64]
    prediction: NDArray[np.int64]
    confidence: NDArray[np.float32]
    nonfinite: NDArray[np.bool_]

    @classmethod
    def blank(cls, batch: int, num_classes: int) -> Answers:
        """Zeros, to be filled by `record`."""
        return cls(
            logits=np.zeros((batch, num_classes), np.float32),
            exit_index=np.zeros(batch, np.int64),
            exit_layer=np.zeros(batch, np.int64),
            prediction=np.zeros(batch, np.int64),
            confidence=np.zeros(batch, np.float32),
            nonfinite=np.zeros(batch, np.bool_),
        )

    def record(
        self, rows: NDArray[np.int64], index: int, layer: int, output: SegmentOutput
    ) -> None:
        """Write what an exit says of all who reached it; those who go on are written again later."""
        self.logits[rows] = output.logits
        self.exit_index[rows] = index
        self.exit_layer[rows] = layer
        self.prediction[rows] = output.prediction
        self.confidence[rows] = output.confidence
        self.nonfinite[rows] |= ~output.valid

    def topk(self, k: int = 5) -> TopK:
        """The k likeliest classes of each image; at most K are given."""
        classes = np.argsort(-self.logits, axis=-1, kind="stable")[:, :k]
        with np.errstate(invalid="ignore"):  # an image whose logits are not numbers is flagged
            probabilities = np.exp(log_softmax(self.logits))
        return TopK(np.take_along_axis(probabilities, classes, axis=-1), classes)


class TopK(NamedTuple):
    """The k likeliest classes of each image: `lgvit_fast.outputs.TopK` in NumPy."""

    probabilities: NDArray[np.float32]  # [B, k], descending
    classes: NDArray[np.int64]  # [B, k]


class DeployedExit(NamedTuple):
    """Where an exit sits and what is there."""

    layer: int  # the block before it, from 1
    head: str


class Deployed:
    """An exported model, answering on ONNX Runtime or OpenVINO. Needs neither torch nor timm.

    An image's answer does not depend on the batch it comes in, and is that of `LGViT.infer` to float32
    rounding, unless the export is int8. Calls from several threads wait for one another.

    Args:
        folder: what `lgvit_fast.export` wrote. It need not be trusted: hashes are verified, fields
            validated, and no file outside it is opened.
        runtime: "onnxruntime", "openvino", or "auto" for the first of them that is installed; the
            other way round for int8, in which OpenVINO alone multiplies.
        threads: None takes every processor this process may use.

    Attributes:
        manifest: what the export says of itself: preprocessing, precision, certificate, files.
        exits: place and head of each exit, shallow to deep.
        num_blocks: L.
        num_classes: K.
        class_names: K names, or None.
        certificate: what is known of the policy's accuracy, or None.
        policy: when an image leaves unless a call says otherwise; `Confidence()` if it has none.
        runtime: the one in use.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: another version, a truncated or changed file, or bad arguments.
        RuntimeError: the runtime is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        runtime: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.manifest = Manifest.load(folder)
        *layers, self.num_blocks = self.manifest.layers
        self.exits = tuple(map(DeployedExit, layers, self.manifest.heads))
        self.num_classes = self.manifest.num_classes
        self.class_names = self.manifest.class_names
        self.runtime, load = load_runtime(runtime, threads, self.manifest.precision)
        self._policy: Policy = self.manifest.policy or Confidence()
        self._policy.check(len(self.exits))
        saved = self.manifest.certificate
        self.certificate = None if saved is None else Certificate.from_dict(saved)
        self._lock = threading.Lock()
        self._left = np.zeros(len(self.exits) + 1, np.int64)
        self._graphs: list[Graph] = []
        for index, segment in enumerate(self.manifest.segments):
            data = self.manifest.read(folder, index)
            try:
                self._graphs.append(load(data))
            except Exception as error:  # each runtime has exceptions of its own
                raise ValueError(
                    f"{segment.file} is no graph that {self.runtime} can run: {error}"
                ) from error
        spec = self.manifest.preprocessing
        self._shape = (spec.channels, *spec.size)
        if self._graphs[0].shape != self._shape:
            raise ValueError(
                f"{self.manifest.segments[0].file} takes images {self._graphs[0].shape}, the manifest"
                f" says {self._shape}: export the model anew"
            )

    @property
    def policy(self) -> Policy:
        """When an image is sure enough to leave; see `Deployed`."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = self._fitting(policy)

    def __call__(self, images: NDArray[np.float32], policy: Policy | None = None) -> Answers:
        """Answer each image at the first exit that is sure.

        Args:
            images: `[B, channels, H, W]` float32, preprocessed; B = 0 is fine.
            policy: None takes `self.policy`.

        Raises:
            ValueError: images of another type, shape or dtype, or a policy for another number of exits.
        """
        policy = self._policy if policy is None else self._fitting(policy)
        tokens = self._checked(images)
        batch, last = len(tokens), len(self.exits)
        answers = Answers.blank(batch, self.num_classes)
        rows, state = np.arange(batch), policy.start_array(batch)
        # A runtime's vectorised exp or max may turn a NaN into a number, so it is looked for here too.
        broken = _broken(tokens)
        answers.nonfinite[:] = broken
        with self._lock:
            for index, layer in enumerate(self.manifest.layers if batch else ()):
                output = self._run(index, tokens, broken)
                if index == last:
                    answers.record(rows, index, layer, output)
                    break
                output, leave = decide(policy, index, output, state)
                answers.record(rows, index, layer, output)
                assert output.tokens is not None
                count = compact(~leave, output.tokens, rows, broken, state)
                if not count:
                    break
                tokens, rows = output.tokens[:count], rows[:count]
                broken, state = broken[:count], state[:count]
            self._left += np.bincount(answers.exit_index, minlength=len(self._left))
        return answers

    @property
    def left(self) -> tuple[int, ...]:
        """Images that have left at each exit, and that ran to the end: for `Certificate.check`."""
        return tuple(self._left.tolist())

    def reset_left(self) -> None:
        """Begin these counts anew."""
        self._left[:] = 0

    def forward_exits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run every image to the end and ask every exit: logits `[E + 1, B, K]`, the final last."""
        tokens = self._checked(images)
        shape = (len(self.exits) + 1, len(tokens), self.num_classes)
        logits = np.zeros(shape, np.float32)
        broken = _broken(tokens)
        with self._lock:
            for index in range(shape[0] if len(tokens) else 0):
                output = self._run(index, tokens, broken)
                logits[index] = output.logits
                if output.tokens is not None:
                    tokens = output.tokens
        return logits

    def predict(
        self,
        paths: Sequence[str | os.PathLike[str]],
        policy: Policy | None = None,
        batch_size: int = 32,
    ) -> Answers:
        """Answer image files, preprocessed as the manifest says.

        Args:
            paths: image files; any format that Pillow reads.
            policy: see `__call__`. A scripted one scripts all the files.
            batch_size: files in memory at a time.

        Raises:
            OSError: a file that is missing or is no whole image.
            ValueError: see `__call__`.
        """
        if isinstance(paths, str | bytes | os.PathLike):
            raise ValueError(f"paths={paths!r}, expected a list of files")
        policy = self._policy if policy is None else self._fitting(policy)
        read = self.manifest.preprocessing.read
        parts = []
        for start in range(0, len(paths), batch_size):
            images = np.stack([read(path) for path in paths[start : start + batch_size]])
            parts.append(self(images, policy.part(start, start + len(images))))
        if not parts:
            return Answers.blank(0, self.num_classes)
        return Answers(*(np.concatenate(field) for field in zip(*map(_fields, parts), strict=True)))

    def _run(
        self, index: int, tokens: NDArray[np.float32], broken: NDArray[np.bool_]
    ) -> SegmentOutput:
        """A graph's outputs; an image that is `broken` already says nothing."""
        output = self._graphs[index].run(tokens)
        valid = output.valid & ~broken
        if valid.all():
            return output
        nan = np.float32(np.nan)
        return output._replace(
            logits=np.where(broken[:, None], nan, output.logits),
            confidence=np.where(valid, output.confidence, nan),
            entropy=np.where(valid, output.entropy, nan),
            valid=valid,
        )

    def _fitting(self, policy: Policy) -> Policy:
        if not isinstance(policy, Policy):
            raise ValueError(
                f"policy={policy!r}, expected a lgvit_fast policy such as Confidence(0.8)"
            )
        policy.check(len(self.exits))
        return policy

    def _checked(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        if not isinstance(images, np.ndarray):
            raise ValueError(f"images is a {type(images).__name__}, expected a NumPy array")
        if images.dtype != np.float32:
            raise ValueError(
                f"images is {images.dtype}, expected float32: images.astype('float32')"
            )
        if images.ndim != 4 or images.shape[1:] != self._shape:
            expected = ", ".join(map(str, self._shape))
            raise ValueError(f"images has shape {images.shape}, expected [B, {expected}]")
        return np.ascontiguousarray(images)


def decide(
    policy: Policy, index: int, output: SegmentOutput, state: NDArray[np.int32]
) -> tuple[SegmentOutput, NDArray[np.bool_]]:
    """The answers of an exit under a policy, and who leaves, `[n]` bool; updates `state` in place."""
    leave = apply_rule(policy.rule(index), output, state)
    given: Any = ExitStep(output.logits, leave, output.valid)  # type: ignore[arg-type]
    step: Any = policy.decide(given, state, index)  # type: ignore[arg-type]
    if step.logits is not output.logits:  # exits that answer together
        confidence = np.exp(log_softmax(step.logits)).max(axis=-1)
        prediction = step.logits.argmax(axis=-1)
        output = output._replace(logits=step.logits, confidence=confidence, prediction=prediction)
    return output, step.leave


def apply_rule(
    rule: ExitRule, output: SegmentOutput, state: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Who leaves, `[n]` bool; updates `state` `[n, 2]` in place. `ops.exit_step.apply_rule` in NumPy.

    Comparisons are strict, and none with NaN holds, so an image that is not valid stays.
    """
    if rule.kind == RuleKind.NEVER:
        return np.zeros_like(output.valid)
    if rule.kind == RuleKind.CONFIDENCE:
        return output.confidence > np.float32(rule.threshold)
    run, last = state[:, 0], state[:, 1]
    if rule.kind == RuleKind.PATIENCE:
        agreed = np.where(output.prediction == last, run + 1, 1)
        run[:] = np.where(output.valid, agreed, 0)
        last[:] = np.where(output.valid, output.prediction, -1)
        return run >= rule.patience
    sure = output.entropy < np.float32(rule.threshold)
    if rule.kind == RuleKind.ENTROPY:
        return sure
    run[:] = np.where(sure, run + 1, 0)
    return run >= rule.patience


def compact(keep: NDArray[np.bool_], *arrays: NDArray[np.generic]) -> int:
    """Bring the rows to keep to the front of every array, in place, and count them.

    Only survivors behind the n-th row move, each into a hole before it: `ops.compact_` in NumPy.
    """
    count = int(np.count_nonzero(keep))
    holes = np.flatnonzero(~keep[:count])
    if len(holes):
        survivors = count + np.flatnonzero(keep[count:])
        for array in arrays:
            array[holes] = array[survivors]
    return count


def _broken(images: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`[B]` bool, whether an image has a NaN or infinite pixel."""
    with np.errstate(over="ignore", invalid="ignore"):
        doubtful: NDArray[np.bool_] = ~np.isfinite(
            images.sum(axis=(1, 2, 3))
        )  # one pass, and nothing to allocate
    for row in np.flatnonzero(doubtful):  # the sum of large numbers may overflow
        doubtful[row] = not np.isfinite(images[row]).all()
    return doubtful


def _fields(answers: Answers) -> tuple[NDArray[np.generic], ...]:
    return tuple(vars(answers).values())
