"""The engine: a model's `infer`, made fast by preparing once what every batch needs."""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Literal, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.backbones import Backbone, adapt
from lgvit_fast.heads import ExitHead
from lgvit_fast.inference.exports import Exports, check_runtime, on_arrays, usable_runtimes
from lgvit_fast.inference.graphs import (
    BucketRunner,
    CaptureError,
    Graphs,
    Program,
    capture_eager,
    capture_graph,
    default_buckets,
)
from lgvit_fast.inference.prepared import compiled_segment, compiled_twin, prepared_twin
from lgvit_fast.inference.report import Report, RuntimeTiming, Tally
from lgvit_fast.inference.runtime_choice import facts_of, measure, recall, remember
from lgvit_fast.inference.turns import add_lock, take_turn
from lgvit_fast.inference.untrained import warn_if_untrained
from lgvit_fast.model import LGViT
from lgvit_fast.ops.dispatch import chosen_backend
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import POLICIES, Policy, Replay
from lgvit_fast.runtimes.loaders import RUNTIMES
from lgvit_fast.runtimes.loop import Answers, GraphSegment, run_graphs
from lgvit_fast.segments import Segment, cut, run_segments
from lgvit_fast.watch import Watch

__all__ = ["Engine"]

_logger = logging.getLogger("lgvit_fast")
_LOOK_IMAGES = 32  # images in whose time the engine looks at all weights once, byte by byte
_NOTHING = nullcontext()
_MAX_RUNNERS = 4  # kept at once: sets of graphs for other image sizes, dtypes or policy rules


class Engine:
    """Answers batches as `model.infer` does, faster.

    On a GPU the segments are captured as CUDA graphs at a few batch sizes, and the host waits once per
    exit, for the number of survivors. On the CPU the backbone's linear layers run on the fastest
    library the machine has. Weights are shared with the model; when they change, what was made from
    them is made anew: at the next call after any in-place operation or replacement. A write that no
    version counter tells of (through `.data`, to an inference tensor) is seen before 32 more images
    are answered on a CPU, at once in batches of 32; on a GPU, where only the heads are copied, within
    as many calls as these have tensors; `refresh` sees it now. With graphs the engine looks while the
    first segment runs, and computes anew what that computed of other weights. Calls from several
    threads take turns; a call from inside another one (a policy, a signal handler) is an error. Under
    autocast graphs cast the weights in every call; a model converted to bfloat16 is faster.

    On a CPU in float32, ONNX Runtime or OpenVINO may be faster than torch. They run the model's
    segments, exported in memory when they are first needed and again when weights change, which takes
    seconds; each image size in use is an export of its own. A runtime in use holds a copy of the
    weights besides the model's, in place of torch's packed layers; while `warm_up` measures, every
    runtime holds one.

    Args:
        model: in eval mode when called.
        max_batch: larger batches are answered in parts.
        runtime: what runs the segments. "torch"; "onnxruntime" or "openvino", with as many threads as
            torch has; or "auto": torch, until `warm_up` has found the fastest of those installed for
            the batch it is given. Batches of other sizes take the choice of the nearest size, other
            image sizes torch. On a GPU, in bfloat16, under autocast, with `graphs` or `compile` and
            for models that cannot be exported, "auto" is torch.
        graphs: True: CUDA graphs, or an error where there are none. False: launch every kernel. None:
            graphs on a GPU if they can be captured. "eager": the batch sizes and buffers of graphs
            without the graphs, on any device, to look for faults.
        compile: `torch.compile`: with graphs each segment as a whole, at each batch size when that is
            captured, which takes seconds each; else the backbone's blocks, once for all sizes.
        exits: the layers whose exits to ask (see `plan_exits`); None asks all. Policies that count
            exits in a row count those asked.
        buckets: batch sizes to capture, increasing; None takes `default_buckets(max_batch)`.
        speculate: with graphs, launch each segment before the survivors of the one before it have been
            counted. Hides the wait, and wastes what `report().wasted_share` says.
        prepare: on the CPU, in float32 and bfloat16, use packed linear layers (see `PackedLinear`).
            They hold the backbone's matrices a second time, unless the model is packed (see `pack_`).

    Raises:
        ValueError: an argument out of range, `graphs=True` for a model that is not on a GPU, or a
            runtime other than torch with `graphs` or `compile` or for a model that is not float32 on
            the CPU, is packed, or has a head of the user's own.
        RuntimeError: the runtime is not installed; the message names the command that installs it.
    """

    def __init__(
        self,
        model: LGViT,
        max_batch: int = 256,
        runtime: str = "auto",
        *,
        graphs: bool | Literal["eager"] | None = None,
        compile: bool = False,
        exits: Sequence[int] | None = None,
        buckets: Sequence[int] | None = None,
        speculate: bool = False,
        prepare: bool = True,
    ) -> None:
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch={max_batch!r}, expected an integer of at least 1")
        if graphs not in (True, False, None, "eager"):
            raise ValueError(f"graphs={graphs!r}, expected True, False, None or 'eager'")
        device = next(model.parameters()).device
        if graphs is True and device.type != "cuda":
            raise ValueError(f"graphs=True needs the model on a CUDA device, it is on {device}")
        _check_runtime(model, runtime, bool(graphs) or compile)
        self.model, self.max_batch = model, max_batch
        self.exits = _checked_exits(model, exits)
        self._buckets = _checked_buckets(buckets, max_batch)
        self._graphs = device.type == "cuda" if graphs is None else graphs
        self._may_launch = graphs is None  # where a graph cannot be captured
        self._graphs_off = ""  # why it could not
        self._compile = compile
        self._speculate, self._prepare = speculate, prepare
        add_lock(self)
        self._runners: OrderedDict[Hashable, BucketRunner] = OrderedDict()
        self._programs: dict[Hashable, Program] = {}  # compiled segments
        layers = [spec.layer for spec in model.exits]
        self._places = [layers.index(layer) for layer in self.exits]  # of the exits asked, from 0
        self._adapter: Backbone | None = None  # what runs the blocks; None until it is made
        self._segments: tuple[Segment, ...] = ()
        self._watch: Watch | None = None
        self._folded: tuple[object, ...] = ()
        self._dtype: torch.dtype | None = None
        self._asked = False  # whether a batch was answered
        self._runtime = runtime
        self._exports = Exports(model, self._places)
        self._timings: dict[tuple[tuple[int, int], int], RuntimeTiming] = {}  # by image, batch size
        self._ran_on = "torch" if runtime == "auto" else runtime
        self.reset_report()

    def __call__(self, images: Tensor, policy: Policy | None = None) -> Inference:
        """What `model.infer(images, policy)` answers, in input order.

        Args:
            images: `[B, channels, height, width]` on the model's device; any B.
            policy: None takes `model.policy`. Thresholds given one by one are either one for each of
                the model's exits, or one for each exit that this engine asks.

        Raises:
            RuntimeError: the model is in train mode; or graphs were asked for and cannot be captured;
                or this thread is in a call of the engine already.
            ValueError: as `LGViT.infer`; or under autocast on a runtime that was asked for.
        """
        key = self._known_key(images, policy)
        if key is not None:
            policy = policy or self.model.policy
        else:
            policy = self.model.admit(images, policy and self.for_all_exits(policy))
            if not self._asked:
                warn_if_untrained(self.model, policy)
                self._asked = True
        nested = torch.is_inference_mode_enabled()
        with (
            take_turn(self, "the engine"),
            torch.cuda.device_of(images),
            torch.inference_mode(False) if nested else _NOTHING,
            torch.no_grad(),
        ):
            graphs = self._ready(images)
            if images.shape[0] <= self.max_batch:
                return self._run(graphs, images, policy, 0, key)
            parts = images.split(self.max_batch)
            starts = range(0, len(images), self.max_batch)
            return Inference.cat(
                [
                    self._run(graphs, part, policy, start)
                    for part, start in zip(parts, starts, strict=True)
                ]
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Engine cannot be copied or pickled: it holds locks, graphs and prepared weights;"
            " copy or pickle the model, and make an Engine of that"
        )

    def for_all_exits(self, policy: Policy) -> Policy:
        """A policy with thresholds for the exits asked, with thresholds for all exits of the model.

        Any other policy is given back as it is; see `Policy.for_all_exits`.
        """
        if not isinstance(policy, Policy):
            return policy  # for `LGViT.fitting` to refuse
        return policy.for_all_exits(self._places, len(self.model.exits))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in torch, whatever the runtime, prepared from the weights as they are now.

        A new tuple whenever the weights have changed.
        """
        return self.segments_for(_LOOK_IMAGES)

    def segments_for(self, images: int) -> tuple[Segment, ...]:
        """As `segments`, after a look for changed weights as thorough as before so many images."""
        with take_turn(self, "the engine"), torch.inference_mode(False), torch.no_grad():
            self._refresh(images)
            return self._segments

    def new_graphs(self) -> Graphs | None:
        """To record segments with, as this engine does; None where it launches every kernel."""
        if not self._graphs:
            return None
        capture = capture_eager if self._graphs == "eager" else capture_graph
        return Graphs(capture, next(self.model.parameters()).device, self.model)

    def without_graphs(self, error: CaptureError) -> str:
        """Why kernels are launched one by one from now on; where graphs were asked for, raises it."""
        if not self._may_launch:
            raise error
        _logger.warning("CUDA graphs are off: %s", error)
        return str(error)

    def warm_up(self, images: Tensor, policy: Policy | None = None) -> None:
        """Do now what the first calls would do: fold, compile, measure, capture, export.

        With `runtime="auto"`, where there is a choice, measures the runtimes for batches of this size,
        which takes an export, some seconds and a dozen passes; or takes the choice from the user's
        cache (`runtime_choice.cache_file`), if this machine, these versions and threads, the structure
        of the model, its exits and both sizes were measured before. `report` says what was found.

        Args:
            images: `[B, channels, height, width]`, any like those to come; they are answered once.
            policy: None takes `model.policy`.
        """
        if self._runtime == "auto" and len(images):
            self.model.admit(images)
            with take_turn(self, "the engine"), torch.inference_mode(False), torch.no_grad():
                self._choose(images[: self.max_batch])
        self(images, policy)
        with (
            take_turn(self, "the engine"),
            torch.cuda.device_of(images),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            for runner in self._runners.values():
                runner.warm_up()
        self.reset_report()

    def refresh(self) -> None:
        """Make everything anew from the weights as they are now, however they were written."""
        with take_turn(self, "the engine"), torch.inference_mode(False), torch.no_grad():
            in_use = bool(self._segments) or self._ran_on == "torch"
            self._forget()
            self.model.prepare(anew=True)
            self._exports.renew()
            if in_use:
                self._refresh()

    def release(self) -> None:
        """Free graphs, buffers, prepared weights and runtimes; the next call makes them anew."""
        with take_turn(self, "the engine"):
            self._forget()
            self._exports.clear()

    def report(self) -> Report:
        """Batches, padding and waste since the engine was made or `reset_report` called.

        And the runtime in use, with what was measured of each.
        """
        runners = self._runners.values()
        return dataclasses.replace(
            self._tally.report(),
            runtime=self._ran_on,
            timings=tuple(self._timings.values()),
            graphs=sum(runner.captured for runner in runners),
            graph_bytes=sum(runner.nbytes for runner in runners),
            graphs_off=self._graphs_off,
        )

    def reset_report(self) -> None:
        """Begin the counts anew."""
        self._tally = Tally((*self.exits, self.model.num_blocks))

    def _ready(self, images: Tensor) -> tuple[GraphSegment, ...]:
        """What to run these images on, made for the weights as they are now; empty for torch.

        With graphs `_run_buckets` does that.
        """
        if self._graphs:
            self._ran_on = "torch"
            return ()
        size = (images.shape[2], images.shape[3])
        runtime = self._runtime_for(min(len(images), self.max_batch), size)
        if runtime != "torch":
            share = min(1.0, len(images) / _LOOK_IMAGES)
            try:
                graphs = self._exports.segments(runtime, size, share)
            except Exception as error:  # exporters and runtimes raise anything
                if self._runtime != "auto":
                    raise
                _logger.warning("%s is not used: %s", runtime, error)
                self._timings.clear()
            else:
                self._ran_on = runtime
                return graphs
        self._refresh(len(images))
        self._ran_on = "torch"
        return ()

    def _runtime_for(self, batch: int, image_size: tuple[int, int]) -> str:
        if self._runtime == "auto":
            sizes = [known for size, known in self._timings if size == image_size]
            if not sizes or not self._may_choose():
                return "torch"
            nearest = min(sizes, key=lambda known: abs(known - batch))
            return self._timings[image_size, nearest].fastest
        if self._runtime != "torch" and self.model.compute_dtype != torch.float32:
            raise ValueError(
                f"runtime={self._runtime!r} computes in float32, this call in"
                f" {self.model.compute_dtype}: leave autocast, or take runtime='torch'"
            )
        return self._runtime

    def _may_choose(self) -> bool:
        """Whether another runtime than torch can answer now."""
        weight = next(self.model.backbone.parameters())
        plain = weight.device.type == "cpu" and weight.dtype == torch.float32
        plain = plain and self.model.compute_dtype == torch.float32  # no autocast
        return plain and not self._graphs and not self._compile

    def _choose(self, images: Tensor) -> None:
        """Find the fastest runtime for such a batch, and keep what some batch size takes."""
        runtimes = usable_runtimes(self.model) if self._may_choose() else []
        if not runtimes:
            return
        batch, size = len(images), (images.shape[2], images.shape[3])
        facts = facts_of(self.model, self.exits, batch, size)
        timing = recall(facts, ["torch", *runtimes])
        if timing is None:
            try:
                ways = self._exports.load(runtimes, size)
            except Exception as error:  # exporters and runtimes raise anything
                _logger.warning("%s not used: %s", " and ".join(runtimes), error)
                return
            self._refresh()
            work = {name: partial(self._run_graphs, way) for name, way in ways.items()}
            timing = measure({"torch": self._run_plain, **work}, images, len(self.model.exits))
            remember(facts, timing)
        self._timings[size, batch] = timing
        chosen = {known.fastest for known in self._timings.values()}
        self._exports.keep(chosen)
        if "torch" not in chosen:
            self._forget()

    def _run(
        self,
        graphs: tuple[GraphSegment, ...],
        images: Tensor,
        policy: Policy,
        start: int,
        key: Hashable = None,
    ) -> Inference:
        """Answer what is one part of a batch, from image `start` on; `key` is of its runner."""
        batch = images.shape[0]  # in a fifth of the time of `len`
        if not batch:
            return self._blank(0, images.device)
        policy = policy.part(start, start + batch)
        if graphs:
            return self._run_graphs(graphs, images, policy)
        if self._graphs:
            try:
                return self._run_buckets(images, policy, key or self._key(images, policy))
            except CaptureError as error:
                self._graphs_off = self.without_graphs(error)
                self._graphs = False
                self._forget()
                self._refresh()
        return self._run_plain(images, policy)

    def _known_key(self, images: Tensor, policy: Policy | None) -> Hashable:
        """The key of the runner that such images were answered by, under an equal policy; or None.

        What such a call gives was admitted before, and is not looked at again.
        """
        if not self._runners or self.model.training or not isinstance(images, Tensor):
            return None
        if images.dim() != 4 or not 0 < images.shape[0] <= self.max_batch:
            return None
        value = _value_key(policy or self.model.policy)
        key = (_kind(images), value)
        return key if value is not None and key in self._runners else None

    def _key(self, images: Tensor, policy: Policy) -> Hashable:
        """Of the runner that answers such images under such a policy."""
        return _kind(images), _value_key(policy) or _rules_key(policy, self._places)

    def _run_buckets(self, images: Tensor, policy: Policy, key: Hashable) -> Inference:
        """Answer on graphs; whether the weights are still those is seen while the first one runs.

        To look takes longer than to launch. What was computed of other weights is dropped.
        """
        changed = False

        def unchanged() -> bool:
            nonlocal changed
            share = min(1.0, len(images) / _LOOK_IMAGES)
            changed = self._watch is None or self._watch.changed(share)
            return not changed and self._folds_are_those()

        runner = self._runners.get(key)
        if runner is not None:
            try:
                answer = runner.run(images, policy, self._tally, unchanged)
            except CaptureError:
                raise
            except Exception:
                if unchanged():
                    raise
                answer = None
            if answer is not None:
                self._runners.move_to_end(key)
                return answer
        self.model.admit(images, policy)
        if runner is not None:
            self._renew(changed)
        else:
            self._refresh(len(images))
        if key not in self._runners:
            self._runners[key] = self._new_runner(images, policy)
            while len(self._runners) > _MAX_RUNNERS:
                self._runners.popitem(last=False)[1].release()
        answer = self._runners[key].run(images, policy, self._tally)
        assert answer is not None
        return answer

    def _run_plain(self, images: Tensor, policy: Policy) -> Inference:
        answer = self._blank(len(images), images.device)
        run_segments(self._segments, images, policy, answer, self._count)
        return answer

    def _count(self, part: str, segment: Segment, rows: int) -> None:
        if part == "exit":
            self._tally.add(self._segments.index(segment), rows)

    def _run_graphs(
        self, segments: Sequence[GraphSegment], images: Tensor, policy: Policy
    ) -> Inference:
        answers = Answers.blank(len(images), self.model.num_classes)
        array = np.ascontiguousarray(images.detach().numpy())
        run_graphs(segments, array, on_arrays(policy), answers, self._tally.add)
        logits, index, layer, nonfinite = map(
            torch.from_numpy,
            (answers.logits, answers.exit_index, answers.exit_layer, answers.nonfinite),
        )
        return Inference(logits, index, layer, nonfinite, self.model.class_names)

    def _cut(self, adapter: Backbone) -> tuple[Segment, ...]:
        layers = [spec.layer for spec in self.model.exits]
        return cut(adapter, layers, self._heads, self._places)

    def _new_runner(self, images: Tensor, policy: Policy) -> BucketRunner:
        size = (images.shape[2], images.shape[3])
        programs = self._programs if self._compile else None
        graphs = self.new_graphs()
        assert graphs is not None
        return BucketRunner(
            self._segments,
            policy,
            self._buckets,
            images[:1],
            partial(self._blank, device=images.device),
            partial(_program, self._segments, programs, size, _kind(images)),
            graphs,
            self._speculate,
        )

    def _blank(self, batch: int, device: torch.device) -> Inference:
        return self.model.blank(batch, device)

    def _refresh(self, images: int = _LOOK_IMAGES) -> None:
        """Make what is missing or was made from weights that are no more."""
        if self.model.training:
            raise RuntimeError("the model is in train mode: call model.eval() first")
        share = min(1.0, images / _LOOK_IMAGES)
        self._renew(self._watch is not None and self._watch.changed(share))

    def _renew(self, changed: bool) -> None:
        """Make what is missing; all of it if weights have changed."""
        dtype = self.model.compute_dtype
        if self._watch is None or changed or dtype != self._dtype:
            self._forget()
            self._adapter, self._dtype = self._prepared_adapter(dtype), dtype
            packed = self._adapter is not self.model.adapter and not self._compile
            self._watch = Watch(self.model, [self.model if packed else self.model.exit_heads])
        if self._segments and self._folds_are_those():
            return
        self._drop_runners()  # graphs hold the addresses of folded weights
        self.model.prepare(anew=changed)
        self._folded = self._folds()
        assert self._adapter is not None
        self._segments = self._cut(self._adapter)

    def _forget(self) -> None:
        self._drop_runners()
        self._segments, self._adapter, self._watch, self._folded = (), None, None, ()

    def _drop_runners(self) -> None:
        while self._runners:
            self._runners.popitem()[1].release()
        self._programs.clear()

    def _prepared_adapter(self, dtype: torch.dtype) -> Backbone:
        """The backbone on what runs its blocks fastest here; it shares the model's weights."""
        backbone = self.model.backbone
        parameter = next(backbone.parameters())
        on_cpu, plain = parameter.device.type == "cpu", parameter.dtype == dtype  # no autocast
        if self._compile and not self._graphs:
            return adapt(compiled_twin(backbone))
        if self._prepare and on_cpu and plain and dtype in (torch.float32, torch.bfloat16):
            return adapt(prepared_twin(backbone))
        return self.model.adapter

    @property
    def _heads(self) -> list[ExitHead]:
        return cast(list[ExitHead], list(self.model.exit_heads))

    def _folds(self) -> tuple[object, ...]:
        return tuple(head.folded for head in self._heads)

    def _folds_are_those(self) -> bool:
        return all(map(operator.is_, self._folds(), self._folded))


def _check_runtime(model: LGViT, runtime: str, tied: bool) -> None:
    """Refuse a runtime that cannot be had; `tied` says that graphs or compiling tie it to torch."""
    if runtime not in ("auto", "torch", *RUNTIMES):
        names = ", ".join(map(repr, ("auto", "torch", *RUNTIMES)))
        raise ValueError(f"runtime={runtime!r}, expected one of {names}")
    if runtime in RUNTIMES:
        if tied:
            raise ValueError(f"runtime={runtime!r} with graphs or compile, which are torch's")
        check_runtime(model, runtime)


def _kind(images: Tensor) -> Hashable:
    """What a captured segment takes from images and from where it is called."""
    device = images.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return device, images.shape[1:], images.dtype, autocast, chosen_backend()


def _value_key(policy: Policy) -> Hashable:
    """What a captured segment takes from a policy, where that is plain to see; else None."""
    if type(policy) is Replay:
        return Replay
    if type(policy) in POLICIES.values():
        try:
            hash(policy)
        except TypeError:  # a list of thresholds
            return None
        return policy
    return None


def _rules_key(policy: Policy, exits: Sequence[int]) -> Hashable:
    """What a captured segment takes from any policy: its rules, and how it decides."""
    rules = tuple(policy.rule(index) for index in exits)
    reads_only_state = type(policy).decide in (Policy.decide, Replay.decide)
    return type(policy), rules, None if reads_only_state else id(policy)


def _program(
    segments: Sequence[Segment],
    programs: dict[Hashable, Program] | None,
    image_size: tuple[int, int],
    kind: Hashable,
    place: int,
    bucket: int,
) -> Program:
    """What a segment does at a batch size, compiled if `programs`, which keeps it, is given."""
    if programs is None:
        return partial(segments[place].advance, image_size=image_size)
    if (kind, place, bucket) not in programs:
        programs[kind, place, bucket] = compiled_segment(segments[place], image_size)
    return programs[kind, place, bucket]


def _checked_exits(model: LGViT, exits: Sequence[int] | None) -> tuple[int, ...]:
    layers = tuple(spec.layer for spec in model.exits)
    if exits is None:
        return layers
    unknown = [layer for layer in exits if layer not in layers]
    if unknown or list(exits) != sorted(set(exits)):
        raise ValueError(f"exits={list(exits)}, expected increasing layers out of {list(layers)}")
    return tuple(exits)


def _checked_buckets(buckets: Sequence[int] | None, max_batch: int) -> tuple[int, ...]:
    if buckets is None:
        return default_buckets(max_batch)
    sizes = tuple(buckets)
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)) or sizes[-1] != max_batch:
        raise ValueError(
            f"buckets={sizes}, expected increasing batch sizes that end with max_batch={max_batch}"
        )
    return sizes
