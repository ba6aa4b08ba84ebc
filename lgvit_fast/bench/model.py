"""`lgvit-fast bench model`: what early exit gains by the clock, every way beside every other.

A recorded trace says where each image leaves, so that the weights do not matter for speed. Every way
runs the same images in a process of its own, and the processes take turns block by block, so that a
slow moment of the machine hits all and no way is slowed by another's idle threads. A ratio is the
median over rounds of ratios of a round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lgvit_fast.arguments import UsageError, count
from lgvit_fast.bench.passes import Measured, measure
from lgvit_fast.bench.traces import TRACES, Trace
from lgvit_fast.bench.ways import DENSE, PLANNED, LeftOut, Subject, Way, ways
from lgvit_fast.checkpoints.files import save_json, write_atomic
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.deploy.calibration_images import FEWEST_IMAGES
from lgvit_fast.deploy.dense import export_dense, quantize
from lgvit_fast.deploy.exporter import export
from lgvit_fast.inference import Plan, plan_exits
from lgvit_fast.machine import machine
from lgvit_fast.model import LGViT, create_model

__all__ = ["Row", "configure", "exported", "markdown", "plot", "rows_of", "run"]


@dataclass(frozen=True)
class Row:
    """What one way did at one batch size. None where what it is compared with was not measured.

    Attributes:
        way: its name.
        batch_size: images a call (or a segment waits for, in a stream).
        precision: of its matrices.
        ms_per_image: median over rounds.
        images_per_second: the inverse.
        speedup: over eager dense timm.
        like: the dense way of the same kind.
        best_dense: the fastest dense way of the same precision.
        over_best_dense: speed-up over that.
        layer_ratio: depth / mean exit layer of these images; 1 for a dense way.
        realised_share: speed-up over `like` / layer ratio; 1 for a dense way.
        kept_share: `over_best_dense` / layer ratio.
        accuracy: percent right of the model that the trace was recorded with; None where that is not
            known, and in int8, whose answers are others.
        spread: lowest and highest `speedup` of a round.
        p50_ms: of a call; None for a stream.
        p99_ms: likewise.
        working_mib: most memory held at once beyond the weights, while answering; None where a runtime
            does not tell.
    """

    way: str
    batch_size: int
    precision: str
    ms_per_image: float
    images_per_second: float
    speedup: float | None
    like: str
    best_dense: str | None
    over_best_dense: float | None
    layer_ratio: float
    realised_share: float | None
    kept_share: float | None
    accuracy: float | None
    spread: tuple[float, float] | None
    p50_ms: float | None
    p99_ms: float | None
    working_mib: float | None

    @property
    def dense(self) -> bool:
        """Whether every image runs to the end, without exit heads."""
        return self.way == self.like


def rows_of(
    chosen: Sequence[Way],
    measured: Mapping[str, Measured],
    trace: Trace,
    script: Sequence[int],
    batch_size: int,
) -> list[Row]:
    """A row for each way that was measured.

    Args:
        chosen: the ways.
        measured: of `measure`.
        trace: where the images leave, and how accurate that is.
        script: the exits it gave to the images.
        batch_size: images a call.
    """
    chosen = [way for way in chosen if way.name in measured]
    seconds = {name: np.array([sum(p) for p in m.passes]) for name, m in measured.items()}
    layer_ratio = trace.layers[-1] * len(script) / sum(trace.layers[exit] for exit in script)
    rows = []
    for way in chosen:
        taken, own = seconds[way.name], measured[way.name]
        rivals = [w.name for w in chosen if w.dense and w.precision == way.precision]
        best = min(rivals, key=lambda name: float(np.median(seconds[name])), default=None)
        gains = {name: base / taken for name, base in seconds.items()}
        medians = {name: float(np.median(gain)) for name, gain in gains.items()}
        ratio = 1.0 if way.dense else layer_ratio
        per_image = float(np.median(taken)) / len(script)
        calls_ms = 1000 * np.concatenate(own.passes)
        p50, p99 = np.percentile(calls_ms, (50, 99)).tolist() if way.in_batches else (None, None)
        eager = gains.get(DENSE)
        over_best = None if best is None else medians[best]
        rows.append(
            Row(
                way=way.name,
                batch_size=batch_size,
                precision=way.precision,
                ms_per_image=1000 * per_image,
                images_per_second=1 / per_image,
                speedup=medians.get(DENSE),
                like=way.like,
                best_dense=best,
                over_best_dense=over_best,
                layer_ratio=ratio,
                realised_share=medians[way.like] / ratio if way.like in medians else None,
                kept_share=None if over_best is None else over_best / ratio,
                accuracy=_accuracy(way, trace),
                spread=None if eager is None else (float(eager.min()), float(eager.max())),
                p50_ms=p50,
                p99_ms=p99,
                working_mib=own.working_mib,
            )
        )
    return rows


def _accuracy(way: Way, trace: Trace) -> float | None:
    if way.precision == "int8":
        return None
    return trace.dense_accuracy if way.dense else trace.accuracy


_COLUMNS = {
    "batch": "---:", "way": "---", "ms/image": "---:", "images/s": "---:", "speed-up": "---:",
    "over best dense": "---:", "layer ratio": "---:", "realised": "---:", "kept": "---:",
    "accuracy": "---:", "p50 ms": "---:", "p99 ms": "---:", "working MiB": "---:",
}  # fmt: skip


def markdown(rows: Sequence[Row], failed: Sequence[tuple[int, LeftOut]] = ()) -> str:
    """Rows as a Markdown table, then those of ways that failed, with the reason."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (_COLUMNS, _COLUMNS.values())]
    for row in rows:
        early = not row.dense
        cells = [
            str(row.batch_size),
            row.way,
            f"{row.ms_per_image:.2f}",
            f"{row.images_per_second:.2f}",
            _shown(row.speedup, ".2f", "x"),
            _shown(row.over_best_dense, ".2f", "x"),
            _shown(row.layer_ratio if early else None, ".2f", "x"),
            _shown(row.realised_share if early else None, ".3f"),
            _shown(row.kept_share if early else None, ".3f"),
            _shown(row.accuracy, ".1f", " %"),
            _shown(row.p50_ms, ".1f"),
            _shown(row.p99_ms, ".1f"),
            _shown(row.working_mib, ".0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for batch_size, (way, reason) in failed:
        cells = [str(batch_size), way, "failed: " + reason.replace("|", "/")]
        lines.append("| " + " | ".join(cells + [""] * (len(_COLUMNS) - 3)) + " |")
    return "\n".join(lines)


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def plot(rows: Sequence[Row], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the speed-up of every way over eager dense timm, a panel for each batch size."""
    figure = speedup_figure(rows, title)
    FigureCanvasAgg(figure)
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def speedup_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """What `plot` draws."""
    rows = [row for row in rows if row.speedup is not None]
    sizes = sorted({row.batch_size for row in rows})
    height = 0.9 + sum(0.7 + 0.25 * sum(r.batch_size == size for r in rows) for size in sizes)
    figure = Figure(figsize=(7.5, height), dpi=150, layout="constrained")
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        shown = [row for row in rows if row.batch_size == size][::-1]
        colours = ["#8a8f98" if row.dense else "#1f77b4" for row in shown]
        bars = axes.barh([row.way for row in shown], [r.speedup for r in shown], color=colours)
        # on white and above the dashed line, which would run through a number
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        numbers = [f"{row.speedup:.2f}x" for row in shown]
        axes.bar_label(bars, numbers, padding=3, fontsize=8, bbox=box, zorder=3)
        ratio = max(row.layer_ratio for row in shown)
        axes.axvline(ratio, color="#d1242f", linewidth=1, linestyle="--", zorder=2)
        axes.set_title(f"batch {size}", loc="left", fontsize=9)
        axes.margins(x=0.15)
    panels[-1].set_xlabel("images/s over eager dense timm (dashed: layer ratio)")
    figure.suptitle(title, fontsize=10)
    return figure


def _needs(way: Way) -> tuple[str, str]:
    """Precision of what a way loads, and for a dense graph the runtime that it is made for."""
    return way.precision, way.runtime if way.dense else ""


def exported(
    model: LGViT, chosen: Sequence[Way], folder: Path
) -> tuple[dict[tuple[str, str], str], dict[str, str], list[LeftOut]]:
    """What the runtimes load (graphs of the backbone by precision and runtime, exports), and failures.

    int8 is calibrated on noise: the figures are of speed.

    Args:
        model: in eval mode, float32, on the CPU.
        chosen: only what these ways need is made.
        folder: where to.
    """
    spec = InputSpec.of(model.backbone)
    dense: dict[tuple[str, str], str] = {}
    early: dict[str, str] = {}
    failed = []
    loading = [way for way in chosen if way.runtime and (way.dense or way.exported)]
    needed = dict.fromkeys(map(_needs, loading))
    for precision, runtime in needed:
        path = folder / (
            "-".join(("dense", precision, runtime)) if runtime else f"exits-{precision}"
        )
        try:
            if not runtime:
                options: dict[str, Any] = {}
                if precision != "float32":
                    noise = torch.randn(FEWEST_IMAGES, spec.channels, *spec.size)
                    options = {"calibration": noise, "force": True}
                early[precision] = str(export(model, path, precision=precision, **options))
                continue
            path = path.with_suffix(".onnx")
            if precision == "int8":
                whole = folder / "whole.onnx"
                export_dense(model.backbone, spec, whole)
                quantize(whole, path, runtime)
            else:
                export_dense(model.backbone, spec, path)
            dense[precision, runtime] = str(path)
        except Exception as error:  # exporters raise anything
            reason = f"{type(error).__name__}: " + " ".join(f"{error}".split())[:300]
            failed += [
                LeftOut(way.name, reason) for way in loading if _needs(way) == (precision, runtime)
            ]
    return dense, early, failed


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--model",
        default="vit_base_patch16_224",
        metavar="NAME",
        help="timm name (ViT-B/16), or folder of a saved model",
    )
    parser.add_argument(
        "--batch-size",
        type=count,
        nargs="+",
        metavar="B",
        help="default: 1 8 16 32; GPU 1 16 64 256",
    )
    parser.add_argument(
        "--trace",
        default="0.9",
        metavar="T|JSON",
        help=f"where images leave: recorded at threshold {', '.join(TRACES)} (0.9), or a json file",
    )
    parser.add_argument("--images", type=count, default=64, metavar="N", help="a round (64)")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="timed passes (3)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="in PyTorch"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("float32", "int8"),
        default=["float32"],
        help="on ONNX Runtime and OpenVINO (float32)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=count, metavar="N", help="of every way (as many as cores)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--plan", action="store_true", help="also plan the exits, and check the plan's prediction"
    )
    parser.add_argument("--only", nargs="+", metavar="WAY", help="names of ways as in the table")
    parser.add_argument(
        "--timeout", type=count, default=900, metavar="S", help="give a way up after so long (900)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the speed-ups")


def run(args: argparse.Namespace) -> int:
    """The command: prints a table, returns the exit code."""
    trace = TRACES[args.trace] if args.trace in TRACES else Trace.load(args.trace)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = _model(args.model, trace)
    chosen, left_out = ways(
        args.device,
        dtype,
        compiled=not args.no_compile,
        planned=args.plan,
        precisions=args.precision,
    )
    if args.only:
        chosen, left_out = _only(args.only, chosen, left_out), []
    sizes = args.batch_size or ([1, 16, 64, 256] if device.type == "cuda" else [1, 8, 16, 32])
    rows: list[Row] = []
    failed: list[tuple[int, LeftOut]] = []
    plans: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lgvit-bench-") as temporary:
        model.save_pretrained(Path(temporary) / "model")
        dense, early, unexported = exported(model, chosen, Path(temporary))
        failing = {way for way, _ in unexported}
        going = [way for way in chosen if way.name not in failing]
        saved = str(Path(temporary) / "model")
        subject = Subject(saved, args.device, dtype, dense=dense, exported=early)
        model = model.to(device, dtype)
        spec = InputSpec.of(model.backbone)
        for size in sizes:
            number = max(args.images, size)
            script = trace.policy(number, [e.layer for e in model.exits]).exit_index.tolist()
            plan = None
            if args.plan:
                histogram = np.bincount(script, minlength=len(trace.images)).tolist()
                plan = plan_exits(model, histogram, size)
                subject = replace(subject, exits=plan.exits)
            measured, broken = measure(
                going,
                subject,
                (spec.channels, *spec.size),
                script,
                size,
                args.rounds,
                args.timeout,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
            rows += rows_of(chosen, measured, trace, script, size)
            failed += [(size, reason) for reason in (*unexported, *broken)]
            if plan is not None and PLANNED in measured:
                plans.append(_checked(plan, size, rows))
            if args.json is not None:  # now, so that a run that is stopped leaves what it measured
                _save(args, trace, rows, failed, left_out, plans)
    facts = machine()
    print(f"{args.model}, {args.dtype}, {device}\ntrace {trace}")
    print(
        f"{facts['processor']} ({' '.join(facts['instructions'])}), {facts['threads']} threads;"
        f" torch {facts['torch']}, onnxruntime {facts['onnxruntime']}, openvino {facts['openvino']}"
    )
    print(markdown(rows, failed))
    print("\n".join(_notes(rows, left_out)))
    for checked in plans:
        print(
            "batch {batch_size}: planned exits {exits}; predicted {predicted_ms:.2f} ms/image,"
            " measured {measured_ms:.2f}; with all exits predicted {predicted_all_ms:.2f},"
            " measured {measured_all_ms:.2f}".format(**checked)
        )
    if args.png is not None:
        plot(rows, args.png, f"{args.model}, {args.dtype}, {device}")
    return 0


def _save(
    args: argparse.Namespace,
    trace: Trace,
    rows: Sequence[Row],
    failed: Sequence[tuple[int, LeftOut]],
    left_out: Sequence[LeftOut],
    plans: Sequence[dict[str, Any]],
) -> None:
    """Write what was measured so far, with the command and the machine."""
    content = {
        "model": args.model,
        "dtype": args.dtype,
        "trace": asdict(trace),
        "images": args.images,
        "rounds": args.rounds,
        "command": " ".join(sys.argv[1:]),
        "commit": _commit(),
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "failed": [{"batch_size": size, **reason._asdict()} for size, reason in failed],
        "left_out": [missing._asdict() for missing in left_out],
        "plans": list(plans),
    }
    save_json(args.json, content)


def _model(name: str, trace: Trace) -> LGViT:
    """A saved model, or one with random weights and the trace's exits."""
    if Path(name).is_dir():
        model = LGViT.from_pretrained(name)
    else:
        torch.manual_seed(0)
        model = create_model(name, exits=trace.layers[:-1], num_classes=100)
    if model.num_blocks != trace.layers[-1]:
        raise ValueError(
            f"the trace {trace.name!r} is of a model with {trace.layers[-1]} blocks,"
            f" {name} has {model.num_blocks}"
        )
    trace.policy(1, [exit.layer for exit in model.exits])  # raises where the exits are others
    return model.float().eval()


def _only(names: Sequence[str], chosen: Sequence[Way], left_out: Sequence[LeftOut]) -> list[Way]:
    """The ways named, what they are compared with, and the plan's."""
    known = [way.name for way in chosen]
    unknown = [name for name in names if name not in known]
    if unknown:
        missing = "".join(f"; {way}: {reason}" for way, reason in left_out)
        raise UsageError(
            f"--only {', '.join(map(repr, unknown))}: expected ways out of"
            f" {'; '.join(known)}{missing}"
        )
    kept = {DENSE, PLANNED, *names}
    kept |= {way.like for way in chosen if way.name in kept}
    return [way for way in chosen if way.name in kept]


def _notes(rows: Sequence[Row], left_out: Sequence[LeftOut]) -> Iterator[str]:
    """How to read the table, and what is not in it."""
    best = dict.fromkeys(
        f"batch {r.batch_size}, {r.precision}: {r.best_dense}" for r in rows if r.best_dense
    )
    yield "speed-up: over eager dense timm; best dense in the same precision: " + "; ".join(best)
    yield (
        "share of the layer ratio: realised over the dense way of the same kind, kept over the best;"
        " accuracy: of the model that the trace was recorded with"
    )
    for way, reason in left_out:
        yield f"left out: {way}: {reason}"


def _checked(plan: Plan, batch_size: int, rows: Sequence[Row]) -> dict[str, Any]:
    """A plan's predictions beside what was measured."""
    measured = {row.way: row.ms_per_image for row in rows if row.batch_size == batch_size}
    return {
        "batch_size": batch_size,
        "exits": list(plan.exits),
        "predicted_ms": 1000 * plan.seconds,
        "measured_ms": measured[PLANNED],
        "predicted_all_ms": 1000 * plan.seconds_with_all,
        "measured_all_ms": measured.get("engine", float("nan")),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
