"""`lgvit-fast serve`: a model behind HTTP."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from lgvit_fast.arguments import UsageError, count, natural

_NOTES = """\
POST /predict    an image as the body, or a form with one or several files under "image"
GET  /           a page to drop pictures on
GET  /healthz, /readyz, /metrics (Prometheus), /docs (OpenAPI)

There is no authentication and no encryption: --host other than a loopback address belongs behind
something that has both. docs/serving.md tells more.

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
    batches = parser.add_argument_group("batches")
    batches.add_argument(
        "--batch-size", type=count, default=16, metavar="N", help="of each graph (default: 16)"
    )
    batches.add_argument(
        "--max-wait-ms",
        type=float,
        default=2.0,
        metavar="MS",
        help="an image waits so long for others (default: 2)",
    )
    batches.add_argument(
        "--slo-ms",
        type=float,
        metavar="MS",
        help="when answers are expected to take longer, use bolder thresholds, down to the certified"
        " ones",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue",
        type=count,
        default=256,
        metavar="N",
        help="images accepted and not answered; beyond, 429 (default: 256)",
    )
    limits.add_argument(
        "--max-upload-mb",
        type=float,
        default=32.0,
        metavar="MIB",
        help="of a request (default: 32)",
    )
    limits.add_argument(
        "--max-images", type=count, default=64, metavar="N", help="of a request (default: 64)"
    )
    limits.add_argument(
        "--max-pixels",
        type=count,
        default=25_000_000,
        metavar="N",
        help="of an image (default: 25000000)",
    )
    limits.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="for a body to come in, and for an answer (default: 30)",
    )
    parser.add_argument(
        "--top-k", type=count, default=5, metavar="K", help="classes in an answer (default: 5)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    for package in ("fastapi", "uvicorn", "multipart", "prometheus_client", "fastapi_offline"):
        if find_spec(package) is None:
            raise UsageError(f"{package} is not installed: pip install 'lgvit-fast[serve]'")
    from lgvit_fast.serve import Settings
    from lgvit_fast.serve.run import serve

    if args.port > 65535:
        raise UsageError(f"--port {args.port}: expected at most 65535")
    try:
        settings = Settings(
            batch_size=args.batch_size,
            max_wait_ms=args.max_wait_ms,
            queue=args.queue,
            top_k=args.top_k,
            max_upload_mb=args.max_upload_mb,
            max_images=args.max_images,
            max_pixels=args.max_pixels,
            timeout=args.timeout,
            slo_ms=args.slo_ms,
        )
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
