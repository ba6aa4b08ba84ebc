"""The loop over the graphs of a model, in NumPy; `segments.run_segments` is the one in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lgvit_fast.evidence import log_softmax
from lgvit_fast.exit_rules import ExitRule, ExitStep, RuleKind
from lgvit_fast.runtimes.loaders import Graph, SegmentOutput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lgvit_fast.policies import Policy

__all__ = ["Answers", "GraphSegment", "TopK", "broken_images", "checked", "decide", "run_graphs"]


class GraphSegment(NamedTuple):
    """A segment as a graph that a runtime has loaded."""

    graph: Graph
    exit_index: int  # the exit's number from 0; E for the last segment
    layer: int  # the block it ends with, from 1


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
        self,
        rows: NDArray[np.int64],
        which: NDArray[np.int64] | slice,
        index: int,
        layer: int,
        output: SegmentOutput,
    ) -> None:
        """Write what an exit says of images that leave there.

        Args:
            rows: `[n]`, which image each row of `output` belongs to.
            which: of these rows leave.
            index: number of the exit.
            layer: the block before it.
            output: of the exit, n rows.
        """
        rows = rows[which]
        self.logits[rows] = output.logits[which]
        self.exit_index[rows] = index
        self.exit_layer[rows] = layer
        self.prediction[rows] = output.prediction[which]
        self.confidence[rows] = output.confidence[which]

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


def _ignore(place: int, rows: int) -> None:
    pass


def run_graphs(
    segments: Sequence[GraphSegment],
    images: NDArray[np.float32],
    policy: Policy,
    answers: Answers,
    observe: Callable[[int, int], None] = _ignore,
) -> None:
    """Answer a batch: every graph on the images that are left, which are compacted in between.

    Args:
        segments: shallow to deep.
        images: `[B, channels, H, W]`, contiguous; not changed.
        policy: who leaves where; its `decide` gets NumPy arrays.
        answers: filled in; B rows, made by `Answers.blank`.
        observe: called after each segment with its place and its rows.
    """
    if not len(images):
        return
    tokens, rows, state = images, np.arange(len(images)), policy.start_array(len(images))
    # A runtime's vectorised exp or max may turn a NaN into a number, so it is looked for here too.
    broken = broken_images(images)
    answers.nonfinite[:] = broken
    for place, (graph, index, layer) in enumerate(segments):
        output = checked(graph.run(tokens), broken)
        observe(place, len(rows))
        if not output.valid.all():
            answers.nonfinite[rows] |= ~output.valid
        if place == len(segments) - 1:
            answers.record(rows, slice(None), index, layer, output)
            return
        output, leave = decide(policy, index, output, state)
        assert output.tokens is not None
        tokens, gone = output.tokens, leave.nonzero()[0]
        if not len(gone):
            continue
        answers.record(rows, gone, index, layer, output)
        if len(gone) == len(rows):
            return
        count = _compact(~leave, tokens, rows, broken, state)
        tokens, rows = tokens[:count], rows[:count]
        broken, state = broken[:count], state[:count]


def checked(output: SegmentOutput, broken: NDArray[np.bool_]) -> SegmentOutput:
    """A graph's outputs of n images; an image that is `broken` `[n]` already says nothing.

    Scores are NaN where an image is not valid: no rule lets it leave.
    """
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


def broken_images(images: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`[B]` bool, whether an image has a NaN or infinite pixel."""
    with np.errstate(over="ignore", invalid="ignore"):
        doubtful: NDArray[np.bool_] = ~np.isfinite(
            images.sum(axis=(1, 2, 3))
        )  # one pass, and nothing to allocate
    for row in np.flatnonzero(doubtful):  # the sum of large numbers may overflow
        doubtful[row] = not np.isfinite(images[row]).all()
    return doubtful


def decide(
    policy: Policy, index: int, output: SegmentOutput, state: NDArray[np.int32]
) -> tuple[SegmentOutput, NDArray[np.bool_]]:
    """The answers of an exit under a policy, and who leaves, `[n]` bool; updates `state` in place."""
    leave = _apply_rule(policy.rule(index), output, state)
    given: Any = ExitStep(output.logits, leave, output.valid)  # type: ignore[arg-type]
    step: Any = policy.decide(given, state, index)  # type: ignore[arg-type]
    if step.logits is not output.logits:  # exits that answer together
        confidence = np.exp(log_softmax(step.logits)).max(axis=-1)
        prediction = step.logits.argmax(axis=-1)
        output = output._replace(logits=step.logits, confidence=confidence, prediction=prediction)
    return output, step.leave


def _apply_rule(
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


def _compact(keep: NDArray[np.bool_], *arrays: NDArray[np.generic]) -> int:
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
