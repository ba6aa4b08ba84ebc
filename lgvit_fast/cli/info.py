"""`lgvit-fast info`: what is here, what runs where, and what is missing."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

_EXAMPLES = """\
examples:
  lgvit-fast info
  lgvit-fast info --json | jq .extension
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument("--json", action="store_true", help="as one json object")


def run(args: argparse.Namespace) -> int:
    """Print what is known of this installation; always succeeds."""
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Versions, the extension, the backend of every op on each device, and what is missing."""
    import torch

    import lgvit_fast.model  # noqa: F401  its ops register themselves
    from lgvit_fast import _extension
    from lgvit_fast.bench.machine import machine
    from lgvit_fast.ops import report

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
        "missing": missing,
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
    lines += ["", "missing"]
    lines += [f"  {line}" for line in facts["missing"]] or ["  nothing"]
    return "\n".join(lines)
