"""`lgvit-fast info`: what is here, what runs where, and what is missing."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

_EXAMPLES = """\
examples:
  lgvit-fast info
  lgvit-fast info run/stage2/best
  lgvit-fast info --json | jq .extension
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "model",
        metavar="MODEL_FOLDER",
        nargs="?",
        help="also what is known of a saved model, or of hf-hub:USER/MODEL",
    )
    parser.add_argument("--json", action="store_true", help="as one json object")


def run(args: argparse.Namespace) -> int:
    """Print what is known of this installation, and of a model."""
    facts = collect()
    if args.model:
        facts["model"] = describe_model(args.model)
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Versions, the extension, the backend of every op on each device, runtimes, what is missing."""
    import torch

    import lgvit_fast.model  # noqa: F401  its ops register themselves
    from lgvit_fast import _extension
    from lgvit_fast.inference import runtime_choice
    from lgvit_fast.machine import machine
    from lgvit_fast.ops import report
    from lgvit_fast.runtimes.loaders import RUNTIMES, why_missing

    built = _extension.facts()
    why_not = _extension.why_missing()
    here = machine()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    missing = []
    if why_not:
        missing.append(why_not)
    elif torch.cuda.is_available():
        problem = _extension.why_missing(torch.device("cuda", torch.cuda.current_device()))
        missing += [problem] if problem else []
    else:
        missing.append("no GPU that this torch can use: everything runs on the CPU")
    cpu_problem = None if why_not else _extension.why_missing(torch.device("cpu"))
    missing += [cpu_problem] if cpu_problem else []
    if here["triton"] is None:
        missing.append("triton is not installed: no Triton kernels on a GPU; pip install triton")
    return {
        "machine": here,
        "extension": {
            "loaded": why_not is None,
            "build": dataclasses.asdict(built) if built else None,
            "problem": why_not,
        },
        "ops": {device: [row._asdict() for row in report(device)] for device in devices},
        "runtimes": {
            "missing": {name: why for name in RUNTIMES if (why := why_missing(name))},
            "chosen": [
                {
                    "model": facts["model"],
                    "exits": facts["exits"],
                    "threads": facts["threads"],
                    **dataclasses.asdict(timing),
                    "fastest": timing.fastest,
                }
                for facts, timing in runtime_choice.remembered(here)
            ],
        },
        "missing": missing,
    }


def describe_model(folder: str) -> dict[str, Any]:
    """A saved model's exits, policy and certificate, the latter also in words."""
    from lgvit_fast.cli.options import load_model

    model = load_model(folder, "cpu")
    certificate = model.certificate
    config = model.get_config()
    return {
        "folder": folder,
        "backbone": (config["backbone"] or {}).get("name"),
        "classes": model.num_classes,
        "blocks": model.num_blocks,
        "exits": {spec.layer: spec.head for spec in model.exits},
        "policy": config["policy"],
        "policy_text": str(model.policy),
        "certificate": config["certificate"],
        "certificate_text": str(certificate) if certificate else "none: see lgvit-fast calibrate",
    }


def _text(facts: dict[str, Any]) -> str:
    here, extension = facts["machine"], facts["extension"]
    versions = ("lgvit_fast", "python", "torch", "timm", "triton")
    lines = ["versions", *(f"  {name:12}{here[name] or 'not installed'}" for name in versions)]
    lines += ["", "machine", f"  {here['processor']}, {here['cores']} cores"]
    lines[-1] += f", {here['threads']} threads in use"
    lines += [
        f"  {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        for gpu in here["gpus"]
    ] or ["  no GPU"]
    state = extension["build"]["summary"] if extension["build"] else "not built"
    if extension["build"] and not extension["loaded"]:
        state += ", not loaded"
    lines += ["", "compiled operators", f"  {state}"]
    for device, rows in facts["ops"].items():
        lines += ["", f"operators on {device}"]
        for row in rows:
            lines.append(f"  {row['op']:16}{row['backend']}")
            lines += [f"  {'':16}not {name}: {why}" for name, why in row["refused"].items()]
    runtimes = facts["runtimes"]
    lines += ["", "runtimes (CPU)", f"  {'torch':16}{here['torch']}"]
    lines += [
        f"  {name:16}{runtimes['missing'].get(name) or here[name]}"
        for name in ("onnxruntime", "openvino")
    ]
    for row in runtimes["chosen"]:
        times = ", ".join(f"{name} {ms:.2f}" for name, ms in row["milliseconds"].items())
        lines.append(
            f"  {row['model']}, batch {row['batch_size']}, {row['threads']} threads:"
            f" {row['fastest']} ({times} ms an image)"
        )
    if "model" in facts:
        model = facts["model"]
        exits = ", ".join(f"{layer} {head}" for layer, head in model["exits"].items())
        lines += ["", f"model {model['folder']}"]
        lines += [f"  {model['backbone']}, {model['blocks']} blocks, {model['classes']} classes"]
        lines += [f"  exits after {exits}", f"  policy {model['policy_text']}"]
        lines += [f"  certificate: {model['certificate_text']}"]
    lines += ["", "missing"]
    lines += [f"  {line}" for line in facts["missing"]] or ["  nothing"]
    return "\n".join(lines)
