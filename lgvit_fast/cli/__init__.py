"""The `lgvit-fast` command. One file per subcommand, imported only when it is called."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from lgvit_fast._version import __version__
from lgvit_fast.arguments import UsageError
from lgvit_fast.text import printable

__all__ = ["main"]

# Each is a module here with `configure(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "demo": "train a small early-exit model on real digits and see what it gains (minutes)",
    "train": "train a model with early exits, in one or both stages",
    "distill": "give a trained classifier early exits, from pictures without labels",
    "eval": "accuracy, exits and speed of a trained model, and the threshold to use",
    "calibrate": "choose the exits' threshold with a guarantee on the accuracy lost",
    "report": "early exit or not: one page with accuracy and speed beside the alternatives",
    "predict": "classify image files",
    "export": "a trained model to ONNX graphs that run without torch",
    "serve": "a model behind HTTP, each image answered when it leaves",
    "bench": "speed of the fused exits on this machine, beside the plain ones",
    "convert": "checkpoints of the published code, Hugging Face or torchvision to models, and back",
    "info": "what is installed and compiled, which backends run here, what is missing",
}

# Arguments of functions that messages name, and that are options here.
_AS_OPTION = re.compile(r"\b(resume|download)=True\b")

_EXAMPLES = """\
a first look, no data needed:
  lgvit-fast demo

your own images, in one folder per class:
  lgvit-fast train --data photos/ --model vit_small_patch16_224 --pretrained --output run
  lgvit-fast eval run/stage2/best --data photos/validation
  lgvit-fast predict run/stage2/best new-photos/

a classifier that is trained already, and pictures without labels:
  lgvit-fast distill vit_small_patch16_224 --data photos/ --output early

`lgvit-fast COMMAND --help` explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 only if all went well, 2 for a usage that makes no sense, else 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(command="", debug="--debug" in arguments)
    try:
        _accept_any_name()
        args = _parser(arguments).parse_args(arguments, args)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        if args.debug:
            raise
        return _complain(args.command, error, 2)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        if args.debug:
            raise
        return _interrupted(args.command, stop, ends=argv is None)
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error.__context__, KeyboardInterrupt):  # an import that was interrupted
            return _interrupted(args.command, error.__context__, ends=argv is None)
        return _complain(args.command, error, 1)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the one command that is called."""
    parser = argparse.ArgumentParser(
        prog="lgvit-fast",
        description="Vision transformers that answer easy images early.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lgvit-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error, not just its line"
        )
        if name == called:
            module = import_module(f"lgvit_fast.cli.{name}")
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser


def _accept_any_name() -> None:
    """A file name that is not UTF-8, or that the terminal cannot show, is no reason to stop."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _interrupted(command: str, stop: BaseException, ends: bool) -> int:
    """Say so in one line; where the process ends with it, no second Ctrl-C can add to that."""
    if ends:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    hint = f"; {stop}" if str(stop) else ""
    print(f"{f'lgvit-fast {command}'.strip()}: interrupted{hint}", file=sys.stderr)
    return 130


def _complain(command: str, error: Exception, code: int) -> int:
    message = printable(_AS_OPTION.sub(r"--\1", " ".join(str(error).split())))
    if not message or not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    print(f"lgvit-fast {command}: error: {message}", file=sys.stderr)
    return code
