"""Exported models beside the dense model on the same runtimes, each way in a process of its own.

    python benchmarks/deploy.py --model vit_base_patch16_224 --json deploy.json

A runtime's idle threads may spin and slow another runtime in the same process up to twofold, so every
way gets a process, and only one of them works at a time: turns go round block by block. Weights are
random and images leave by a recorded trace, which does not change what a graph costs. The share kept is
(dense time / early-exit time) / layer ratio, both sides on the same runtime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("eager", "dense onnxruntime", "dense openvino", "onnxruntime", "openvino")
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def export_all(name: str, classes: int, folder: Path) -> None:
    """The model with its exits, and its backbone alone by the same exporter."""
    import torch

    import lgvit_fast
    from lgvit_fast.runtimes.segment_graph import OPSET

    torch.manual_seed(0)
    model = lgvit_fast.create_model(name, num_classes=classes).eval()
    lgvit_fast.export(model, folder / "exits")
    dense = torch.onnx.export(
        model.backbone,
        (torch.zeros(2, 3, 224, 224),),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    dense.save(folder / "dense.onnx")


def worker(way: str, folder: Path, name: str, classes: int, threads: int) -> None:
    """Answer lines of `{"batch": B, "exits": [...]}` with milliseconds an image."""
    import numpy as np

    call = make(way, folder, name, classes, threads)
    images = np.random.default_rng(0).standard_normal((32, 3, 224, 224), np.float32)
    for line in sys.stdin:
        task = json.loads(line)
        size, exits = task["batch"], task["exits"]
        began = time.perf_counter()
        for start in range(0, len(exits), size):
            part = exits[start : start + size]
            call(images[start % 32 : start % 32 + len(part)], part)
        print(json.dumps(1000 * (time.perf_counter() - began) / len(exits)), flush=True)


def make(way: str, folder: Path, name: str, classes: int, threads: int) -> Any:
    """A function of images and scripted exits. Imports nothing that its way does not need."""
    if way == "eager":
        import timm
        import torch

        torch.set_num_threads(threads)
        model = timm.create_model(name, num_classes=classes).eval()

        def eager(images: Any, exits: list[int]) -> None:
            with torch.inference_mode():
                model(torch.from_numpy(images))

        return eager
    if way.startswith("dense"):
        from lgvit_fast.runtimes.loaders import LOADERS

        run, _, _ = LOADERS[way.split()[1]](threads)((folder / "dense.onnx").read_bytes())
        return lambda images, exits: run(images)

    import lgvit_fast
    from lgvit_fast.deploy import Deployed

    deployed = Deployed(folder / "exits", way, threads)
    return lambda images, exits: deployed(images, lgvit_fast.Replay(exits))


class Process:
    """A worker that waits for its turn."""

    def __init__(self, way: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, "--worker", way, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, batch: int, exits: list[int]) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"batch": batch, "exits": exits}), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


COLD = """
import sys, time
began = time.perf_counter()
import numpy as np
from lgvit_fast.deploy import Deployed
deployed = Deployed(sys.argv[1], sys.argv[2], int(sys.argv[3]))
deployed(np.zeros((1, 3, 224, 224), np.float32))
print(time.perf_counter() - began)
assert "torch" not in sys.modules
"""


def cold_start(folder: Path, runtime: str, threads: int, rounds: int) -> float:
    """Median seconds from the first import to the first answer, in fresh processes."""
    command = [sys.executable, "-c", COLD, str(folder / "exits"), runtime, str(threads)]
    return statistics.median(float(subprocess.check_output(command)) for _ in range(rounds))


def flags() -> list[str]:
    """The instruction sets that matter here and that this processor has."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in FLAGS if flag in words]


def main() -> None:
    """Measure, print a table, write json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=32, help="a round and way")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="keep the exports here, and reuse them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder, args.model, args.classes, args.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "dense.onnx").exists():
            folder.mkdir(parents=True, exist_ok=True)
            export_all(args.model, args.classes, folder)
        result = measure(args, folder)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every way at every batch size under every trace."""
    from lgvit_fast.bench.traces import TRACES
    from lgvit_fast.machine import machine

    traces = [TRACES["0.9"], TRACES["0.8"]]
    shared = ["--model", args.model, "--classes", str(args.classes), "--folder", str(folder)]
    workers = {w: Process(w, [*shared, "--threads", str(args.threads)]) for w in args.ways}
    rows = []
    try:
        for batch in args.batch_size:
            times: dict[tuple[str, str], list[float]] = {}
            for turn in range(-1, args.rounds):  # the first is warm-up
                for way, run in workers.items():
                    early = not (way == "eager" or way.startswith("dense"))
                    for trace in traces if early else traces[:1]:
                        took = run(batch, trace.exits(args.images))
                        if turn >= 0:
                            times.setdefault((way, trace.name if early else ""), []).append(took)
            rows += list(describe(batch, times, traces, args.images))
    finally:
        for run in workers.values():
            run.close()
    cold = {
        way: cold_start(folder, way, args.threads, args.rounds)
        for way in ("onnxruntime", "openvino")
        if way in args.ways
    }
    for way, seconds in cold.items():
        print(f"cold start on {way}: {seconds:.2f} s")
    about = {"model": args.model, "threads": args.threads, "images": args.images}
    facts = {**machine(), "instructions": flags()}
    return {**about, "rounds": args.rounds, "rows": rows, "cold_start": cold, "machine": facts}


def describe(batch: int, times: dict[tuple[str, str], list[float]], traces: Any, count: int) -> Any:
    """A row for each way and trace, printed as it comes."""
    named = {trace.name: trace for trace in traces}
    for (way, name), values in times.items():
        row: dict[str, Any] = {"batch": batch, "way": way, "ms": statistics.median(values)}
        row["rounds_ms"] = [round(value, 3) for value in values]
        if eager := times.get(("eager", "")):
            row["over_eager"] = statistics.median(eager) / row["ms"]
        if name:
            trace = named[name]
            exits = trace.exits(count)
            ratio = trace.layers[-1] * count / sum(trace.layers[i] for i in exits)
            row |= {"trace": name, "accuracy": trace.accuracy, "layer_ratio": ratio}
            if dense := times.get((f"dense {way}", "")):
                # round by round, so that a slow moment of the machine hits both sides
                gains = [d / early for d, early in zip(dense, values, strict=True)]
                row["over_dense"] = statistics.median(gains)
                row["share"] = row["over_dense"] / ratio
        about = f"{batch:3d}  {way:18s} {row['ms']:8.2f} ms"
        if "share" in row:
            about += f"  {row['over_dense']:.2f}x of {ratio:.2f}x: share {row['share']:.3f}  {name}"
        print(about, flush=True)
        yield row


if __name__ == "__main__":
    main()
