"""The runtime side: an exported model, read and answering."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lgvit_fast.certificate import Certificate
from lgvit_fast.deploy.manifest import Manifest
from lgvit_fast.policies import Confidence, Policy
from lgvit_fast.runtimes.continuous import ContinuousBatcher
from lgvit_fast.runtimes.loaders import Graph, load_runtime
from lgvit_fast.runtimes.loop import Answers, GraphSegment, broken_images, checked, run_graphs

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Answers", "Deployed"]


class DeployedExit(NamedTuple):
    """Where an exit sits and what is there."""

    layer: int  # the block before it, from 1
    head: str


class Deployed:
    """An exported model, answering on ONNX Runtime or OpenVINO. Needs neither torch nor timm.

    An export in format "executorch" answers on ExecuTorch, whose Python package needs torch.

    An image's answer does not depend on the batch it comes in, and is that of `LGViT.infer` to float32
    rounding, unless the export is int8. Calls from several threads wait for one another.

    Args:
        folder: what `lgvit_fast.export` wrote. It need not be trusted: hashes are verified, fields
            validated, and no file outside it is opened. An ExecuTorch program does need to be.
        runtime: "onnxruntime", "openvino", or "auto" for the first of them that is installed; the
            other way round for int8, in which OpenVINO alone multiplies. "executorch" or "auto" for an
            export in that format.
        threads: None takes every processor this process may use. ExecuTorch has one pool of threads
            for the process: the latest `Deployed` sets its size.

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
        self.runtime, load = load_runtime(
            runtime, threads, self.manifest.file_format, self.manifest.precision
        )
        self._policy: Policy = self.manifest.policy or Confidence()
        self._policy.check(len(self.exits))
        saved = self.manifest.certificate
        self.certificate = None if saved is None else Certificate.from_dict(saved)
        self._lock = threading.Lock()
        self._left = np.zeros(len(self.exits) + 1, np.int64)
        graphs: list[Graph] = []
        for index, segment in enumerate(self.manifest.segments):
            data = self.manifest.read(folder, index)
            try:
                graphs.extend(load(data))
            except Exception as error:  # each runtime has exceptions of its own
                raise ValueError(
                    f"{segment.file} is no graph that {self.runtime} can run: {error}"
                ) from error
        if len(graphs) != len(self.manifest.layers):
            raise ValueError(
                f"the export has {len(graphs)} graphs, its manifest says"
                f" {len(self.manifest.layers)}: export the model anew"
            )
        self._segments = [
            GraphSegment(graph, index, layer)
            for index, (graph, layer) in enumerate(zip(graphs, self.manifest.layers, strict=True))
        ]
        spec = self.manifest.preprocessing
        self._shape = (spec.channels, *spec.size)
        shape = self._segments[0].graph.shape
        if shape != self._shape:
            raise ValueError(
                f"{self.manifest.segments[0].file} takes images {shape}, the manifest"
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
        images = self._checked(images)
        answers = Answers.blank(len(images), self.num_classes)
        with self._lock:
            run_graphs(self._segments, images, policy, answers)
            self._left += np.bincount(answers.exit_index, minlength=len(self._left))
        return answers

    def batcher(
        self,
        batch_size: int,
        max_wait: float,
        policies: Sequence[Policy] | None = None,
        observe: Callable[[int, int, float], None] = lambda place, images, seconds: None,
    ) -> ContinuousBatcher:
        """Continuous batching over this model: for images that come one by one, as in a server.

        Args:
            batch_size: images a graph runs at most, and waits for.
            max_wait: seconds after which an image waits no longer for others.
            policies: those that images may be added under; None takes `self.policy` alone.
            observe: see `ContinuousBatcher`.

        Raises:
            ValueError: a policy for another number of exits, or a number out of range.
        """
        policies = [self._policy] if policies is None else list(map(self._fitting, policies))
        return ContinuousBatcher(
            self._segments, policies, batch_size, max_wait, self._lock, observe
        )

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
        broken = broken_images(tokens)
        with self._lock:
            for graph, index, _ in self._segments if len(tokens) else ():
                output = checked(graph.run(tokens), broken)
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


def _fields(answers: Answers) -> tuple[NDArray[np.generic], ...]:
    return tuple(vars(answers).values())
