"""`lgvit-fast bench`: speed on the machine at hand, one suite for each part."""

from __future__ import annotations

import argparse
from importlib import import_module

# Each is `lgvit_fast.bench.NAME` with `configure(parser)` and `run(args) -> exit code`.
SUITES = {
    "heads": "the fused exits beside the plain ones",
    "model": "early exit on a recorded distribution of exits, beside the dense model",
}

_NOTES = """\
Both sides of every ratio take turns: in one process for heads, a process each for models.

examples:
  lgvit-fast bench heads
  lgvit-fast bench model --batch-size 1 16 --json model.json
  lgvit-fast bench heads --batch-size 1 16 --json heads.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the suites, each with its own options."""
    parser.epilog = _NOTES
    suites = parser.add_subparsers(metavar="SUITE", required=True)
    for name, summary in SUITES.items():
        module = import_module(f"lgvit_fast.bench.{name}")
        suite = suites.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(suite)
        suite.set_defaults(suite=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the suite."""
    code: int = args.suite(args)
    return code
