"""`lgvit-fast serve`: a model behind HTTP."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from lgvit_fast.arguments import UsageError, count, natural
from lgvit_fast.serve.settings import Settings

_SETTINGS = [field.name for field in dataclasses.fields(Settings)]

_NOTES = """\
POST /predict    an image as the body, or a form with one or several files under "image"
GET  /           a page to drop pictures on
GET  /healthz, /readyz, /metrics (Prometheus), /docs (OpenAPI)

There is no authentication and no encryption: --host other than a loopback address belongs behind
something that has both. SIGTERM and SIGINT stop the server, with exit code 0. docs/serving.md tells
more.

examples:
  lgvit-fast export run/stage2/best exported
  lgvit-fast serve exported
  curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' http://localhost:8000/predict
  curl -F image=@cat.jpg -F image=@dog.jpg http://localhost:8000/predict
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _NOTES
    parser.add_argument(
        "model", metavar="FOLDER", help="an exported model; a saved one is exported first"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument(
        "--port", type=natural, default=8000, metavar="P", help="0: a free one (default: 8000)"
    )
    parser.add_argument(
        "--workers", type=count, default=1, metavar="N", help="processes (default: 1)"
    )
    parser.add_argument(
        "--runtime", default="auto", choices=("auto", "onnxruntime", "openvino", "executorch")
    )
    parser.add_argument(
        "--threads", type=count, metavar="N", help="of each process (default: share the cores)"
    )
    group = parser.add_argument_group("batches")
    _setting(group, "batch_size", count, "N", "of each graph")
    _setting(group, "max_wait_ms", float, "MS", "an image waits so long for others")
    group.add_argument(
        "--slo-ms",
        type=float,
        metavar="MS",
        help="when answers are expected to take longer, use bolder thresholds, down to the certified"
        " ones",
    )
    group = parser.add_argument_group("limits")
    _setting(group, "queue", count, "N", "images accepted and not answered; beyond, 429")
    _setting(group, "max_upload_mb", float, "MIB", "of a request")
    _setting(group, "max_images", count, "N", "of a request")
    _setting(group, "max_pixels", count, "N", "of an image")
    _setting(group, "timeout", float, "S", "for a body to come in, and for an answer")
    _setting(
        group,
        "stop_seconds",
        float,
        "S",
        "after SIGTERM, to answer what was accepted; the rest, 503",
    )
    _setting(parser, "top_k", count, "K", "classes in an answer")


def _setting(
    to: argparse._ActionsContainer, name: str, kind: Callable[[str], Any], unit: str, text: str
) -> None:
    """An option of the name and default of one of the server's settings."""
    default = getattr(Settings, name)
    to.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        default=default,
        metavar=unit,
        help=f"{text} (default: {default:.8g})",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    for package in ("fastapi", "uvicorn", "multipart", "prometheus_client", "fastapi_offline"):
        if find_spec(package) is None:
            raise UsageError(f"{package} is not installed: pip install 'lgvit-fast[serve]'")
    from lgvit_fast.serve.run import serve

    if args.port > 65535:
        raise UsageError(f"--port {args.port}: expected at most 65535")
    try:
        settings = Settings(**{name: getattr(args, name) for name in _SETTINGS})
    except ValueError as error:
        raise UsageError(str(error)) from error
    serve(
        args.model,
        settings,
        host=args.host,
        port=args.port,
        workers=args.workers,
        runtime=args.runtime,
        threads=args.threads,
    )
    return 0
