"""Ways to run a ViT in 8 or 16 bits on a CPU: answers kept, independence of batch mates, time.

    python benchmarks/int8.py --weights model.safetensors --photos photos.tar --json int8.json

The dense model, exported once and quantized by each scheme; every way in a process of its own, turns
taken block by block. The photos are a tar or folder of class folders, named by class number. Two times
stand in the json: of the clock, and of the processor, which other load on the machine disturbs less.
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

import numpy as np

# name: file, runtime, and what differs from the settings that `Deployed` uses
WAYS = {
    "float32, ONNX Runtime": ("float32", "onnxruntime", {}),
    "float32, OpenVINO": ("float32", "openvino", {}),
    "bfloat16, OpenVINO": ("float32", "openvino", {"INFERENCE_PRECISION_HINT": "bf16"}),
    "int8 as exported, OpenVINO": ("rows", "openvino", {}),
    "int8 as exported, and bfloat16, OpenVINO": (
        *("rows", "openvino"),
        {"INFERENCE_PRECISION_HINT": "bf16"},
    ),
    "int8 as exported, ONNX Runtime": ("rows", "onnxruntime", {}),
    "dynamic, a range a tensor, ONNX Runtime": ("dynamic", "onnxruntime", {}),
    "MatMulNBits, 8 bits, ONNX Runtime": ("nbits", "onnxruntime", {}),
    "static, NNCF with SmoothQuant, OpenVINO": ("static", "openvino", {}),
    "static, NNCF with SmoothQuant, ONNX Runtime": ("static", "onnxruntime", {}),
}
BATCHES = (1, 16)


def prepare(args: argparse.Namespace, folder: Path) -> np.ndarray:
    """Write the graphs and the photos; give the photos' classes."""
    import onnx
    import timm
    import torch
    from safetensors.torch import load_file

    from lgvit_fast.data import ImageSource, InputSpec, eval_transform, open_dataset
    from lgvit_fast.deploy.exporter import OPSET
    from lgvit_fast.deploy.int8 import quantize

    model = timm.create_model(args.model).eval()
    model.load_state_dict(load_file(args.weights))
    spec = InputSpec.of(model)
    dataset = open_dataset(str(args.photos))
    source = ImageSource(dataset, eval_transform(spec))
    places = np.linspace(0, len(source) - 1, min(args.images, len(source))).round().astype(int)
    parts = [source.__getitems__([(0, place)]) for place in places.tolist()]
    images = torch.cat([part.images for part in parts]).numpy()
    np.save(folder / "images.npy", images)
    classes = np.array([int(source.class_names[part.targets[0]]) for part in parts])

    torch.onnx.export(
        model,
        (torch.zeros(2, *images.shape[1:]),),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    ).save(folder / "float32.onnx")
    graph = onnx.load(folder / "float32.onnx")
    if wanted(args, "rows"):
        onnx.save(quantize(graph), folder / "rows.onnx")
    if wanted(args, "dynamic"):
        from onnxruntime.quantization import quantize_dynamic

        source_file, made = (str(folder / f"{name}.onnx") for name in ("float32", "dynamic"))
        quantize_dynamic(
            source_file, made, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
    if wanted(args, "nbits"):
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            graph, bits=8, block_size=64, is_symmetric=True, accuracy_level=4
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "nbits.onnx"))
    if wanted(args, "static"):
        import nncf

        name = graph.graph.input[0].name
        chosen = images[:: max(len(images) // 128, 1)][:128]
        data = nncf.Dataset([{name: image[None]} for image in chosen])
        made = nncf.quantize(
            onnx.load(folder / "float32.onnx"),
            data,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(chosen),
        )
        onnx.save(made, folder / "static.onnx")
    return classes


def wanted(args: argparse.Namespace, file: str) -> bool:
    return any(WAYS[way][0] == file for way in args.ways)


def worker(way: str, folder: Path, threads: int) -> None:
    """Write logits to a file on "logits"; give milliseconds an image on a batch size."""
    from lgvit_fast.deploy import runtimes

    file, runtime, settings = WAYS[way]
    load = runtimes.LOADERS[runtime](threads)
    if settings:
        import openvino

        compiled = openvino.Core.compile_model

        def with_settings(core: Any, model: Any, device: str, config: dict[Any, Any]) -> Any:
            return compiled(core, model, device, config | settings)

        openvino.Core.compile_model = with_settings
    run, _, _ = load((folder / f"{file}.onnx").read_bytes())
    images = np.load(folder / "images.npy", mmap_mode="r")

    def logits(batch: np.ndarray) -> np.ndarray:
        return np.array(run(np.ascontiguousarray(batch))[0])

    for line in sys.stdin:
        if line.strip() == "logits":
            found = [logits(images[start : start + 16]) for start in range(0, len(images), 16)]
            alone = logits(images[:1])
            outliers = np.array(images[:7])
            outliers[1:] *= 50
            mates = max(np.abs(logits(x)[0] - alone[0]).max() for x in (images[:7], outliers))
            np.save(folder / "logits.npy", np.concatenate(found))
            print(json.dumps(float(mates)), flush=True)
        else:
            size = int(line)
            batches = [np.ascontiguousarray(images[i : i + size]) for i in range(0, 16, size)]
            clock, processor = time.perf_counter(), time.process_time()
            for batch in batches:
                run(batch)
            taken = time.perf_counter() - clock, time.process_time() - processor
            print(json.dumps([1000 * seconds / 16 for seconds in taken]), flush=True)


class Process:
    """A worker that waits for its turn."""

    def __init__(self, way: str, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", way, "--folder", folder]
        self.process = subprocess.Popen(
            [*map(str, command), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, request: str | int) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(request, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def measure(args: argparse.Namespace, folder: Path, classes: np.ndarray) -> list[dict[str, Any]]:
    """A row for each way, printed as it comes."""
    rows: dict[str, dict[str, Any]] = {}
    reference = None
    for threads in args.threads:
        workers = {way: Process(way, folder, threads) for way in args.ways}
        for way, ask in workers.items():
            if way not in rows:
                mates = ask("logits")
                logits = np.load(folder / "logits.npy")
                reference = logits if reference is None else reference
                rows[way] = {
                    "way": way,
                    "top1": 100 * float((logits.argmax(-1) == classes).mean()),
                    "agreement": 100 * float((logits.argmax(-1) == reference.argmax(-1)).mean()),
                    "mean_difference": float(np.abs(logits - reference).mean()),
                    "changed_by_batch_mates": mates,
                    "times": [],
                }
        taken: dict[tuple[str, int], list[list[float]]] = {}
        for turn in range(-1, args.rounds):  # the first is warm-up
            for way, ask in workers.items():
                for size in BATCHES:
                    milliseconds = ask(size)
                    if turn >= 0:
                        taken.setdefault((way, size), []).append(milliseconds)
        for (way, size), values in taken.items():
            clock, processor = (statistics.median(column) for column in zip(*values, strict=True))
            rows[way]["times"].append(
                {"threads": threads, "batch": size, "ms": clock, "processor_ms": processor}
            )
        for ask in workers.values():
            ask.close()
    for row in rows.values():
        times = "  ".join(
            f"{t['threads']}x{t['batch']}: {t['ms']:.1f} ({t['processor_ms']:.1f})"
            for t in row["times"]
        )
        print(
            f"{row['way']:45s} {row['top1']:.1f} % right, {row['agreement']:.1f} % agree, mates"
            f" {row['changed_by_batch_mates']:.1e}; ms, threads x batch (processor): {times}"
        )
    return list(rows.values())


def main() -> None:
    """Measure, print a table, write json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--weights", type=Path, help="its safetensors file")
    parser.add_argument(
        "--photos", type=Path, help="tar or folder of folders named by class number"
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder, args.threads[0])
        return
    if not args.weights or not args.photos:
        parser.error("--weights and --photos are needed")
    from lgvit_fast.machine import machine

    with tempfile.TemporaryDirectory() as temporary:
        classes = prepare(args, Path(temporary))
        rows = measure(args, Path(temporary), classes)
    about = {"model": args.model, "images": len(classes), "rounds": args.rounds}
    if args.json:
        text = json.dumps({**about, "rows": rows, "machine": machine()}, indent=2)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
