"""The code blocks of the project's pages, and a folder of small stand-ins in which they run.

A page's Python blocks run in order in one namespace, its shell blocks where they stand between
them. Models are built narrow, and the names that pages use (`photos/`, `run/stage2/best`, ...)
are there with a few images and random weights, so that every block runs as it is written in
seconds. Two marks, HTML comments that readers do not see:

    <!-- setup
    python that runs first
    -->
    <!-- not run: REASON -->     before a block that takes minutes; its arguments are still parsed
"""

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lgvit_fast
from lgvit_fast.cli import _parser, main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])

# Appended to a command that runs, so that it takes seconds; the page's own options come first.
SHORTER = {
    "train": [
        *("--stage1.epochs", "1", "--stage1.warmup-epochs", "0", "--stage2.epochs", "1"),
        *("--stage2.warmup-epochs", "0", "--workers", "0", "--batch-size", "4"),
        *("--exits", "2", "--model-kwargs", "depth=4"),
    ],
    "distill": ["--epochs", "1", "--batch-size", "16", "--workers", "0"],
    "eval": ["--timing-images", "2", "--timing-rounds", "1", "--timing-batch", "2"],
}

# Programs that are never run here, and why; what can be checked of their arguments is.
NOT_RUN = {
    "make": "starts installations and whole suites",
    "pip": "changes the environment",
    "pytest": "this is pytest",
    "python": "scripts have tests of their own",
    "torchrun": "starts several processes",
    "ray": "starts several processes",
    "curl": "needs a server",
    "git": "changes the checkout",
}

_SETUP = r"^<!-- setup\n(?P<setup>.*?)^-->$"
_FENCE = (
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$"
)
_BLOCK = re.compile(f"{_SETUP}|{_FENCE}", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block, or a hidden setup (`language` "setup")."""

    language: str
    code: str
    line: int  # of the page, where the code begins less one
    reason: str | None = None  # why it is not run


def blocks(text: str) -> list[Block]:
    """The blocks of a page in order."""
    found = []
    for match in _BLOCK.finditer(text):
        if match["setup"] is not None:
            line = text.count("\n", 0, match.start("setup"))
            found.append(Block("setup", match["setup"], line))
            continue
        indent, line = len(match["indent"]), text.count("\n", 0, match.start("code"))
        code = "".join(row[indent:] or "\n" for row in match["code"].splitlines(keepends=True))
        found.append(Block(match["language"], code, line, match["reason"]))
    return found


def commands(code: str) -> list[str]:
    """The commands of a shell block, a continued line as one."""
    joined = code.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and line.strip()[0] != "#"]


def check(command: str) -> None:
    """Raises unless the program is known and takes these arguments."""
    for part in _pipeline(command)[0]:
        program, *arguments = part
        if program == "lgvit-fast":
            parse(arguments)
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(arguments) <= set(targets), command
        elif program == "python" and arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1]), command
        elif program == "python":
            assert (ROOT / arguments[0]).exists(), command
        elif program == "torchrun":
            assert arguments[arguments.index("-m") + 1] == "lgvit_fast", command
            parse(arguments[arguments.index("-m") + 2 :])
        elif "/" in program:
            assert (ROOT / program).exists() or program.startswith(".venv/"), command
        else:
            assert program in (*NOT_RUN, "find"), f"unknown program: {command}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """`lgvit-fast` arguments as its own parser reads them; raises SystemExit for wrong ones."""
    if "--help" in arguments or "--version" in arguments:
        return argparse.Namespace()
    return _parser(arguments).parse_args(arguments)


def run(command: str) -> None:
    """Run a shell line: `lgvit-fast` in this process, a `find` before it for real."""
    parts, target = _pipeline(command)
    check(command)
    text = ""
    for program, *arguments in parts:
        if program == "find":
            text = subprocess.check_output([program, *arguments], text=True)
        elif program == "lgvit-fast":
            extra = SHORTER.get(arguments[0], [])
            output, errors = io.StringIO(), io.StringIO()
            with (
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(errors),
                _stdin(text),
            ):
                code = main([*arguments, *extra])
            assert code == 0, f"{command}\n{errors.getvalue()}"
            text = output.getvalue()
    if target:
        Path(target).write_text(text)


def _pipeline(command: str) -> tuple[list[list[str]], str | None]:
    """The parts of a shell line between pipes, without variables set before them; and `> FILE`."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    words, target = list(lexer), None
    if ">" in words:
        words, target = words[: words.index(">")], words[words.index(">") + 1]
    for word in words:
        if word == "|":
            parts.append([])
        elif parts[-1] or not re.match(r"[A-Z_]+=", word):
            names = sorted(Path().glob(word)) if "*" in word and "'" not in command else []
            parts[-1] += [str(name) for name in names] or [word]
    return parts, target


@contextlib.contextmanager
def _stdin(text: str) -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin = before


def narrow(create_model: Any) -> Any:
    """`timm.create_model` with ViTs 32 channels wide unless a width is given; no downloads."""

    def create(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if name.startswith(("vit_", "deit")) and "embed_dim" not in kwargs:
            kwargs |= {"embed_dim": 32, "num_heads": 2}
        return create_model(name, pretrained=False, **kwargs)

    return create


def furnish(folder: Path) -> None:
    """The files that pages speak of: images in class folders, image files, saved models."""
    for number, name in enumerate(("cat", "dog", "cat", "dog", "cat", "dog", "cat", "dog")):
        for place in ("photos/train", "photos/validation", "photos-test", "flowers"):
            _image(folder / place / name / f"{number}.jpg", number)
        _image(folder / "images" / f"{number}.jpg", number)
        _image(folder / f"{name}.jpg", number)
    for number in range(60):
        _image(folder / "pictures" / f"{number}.jpg", number)
    for name in ("train", "test"):
        (folder / "cifar10").mkdir(exist_ok=True)
        with tarfile.open(folder / "cifar10" / f"{name}.tar", "w") as tar:
            tar.add(folder / "photos-test", ".")
    torch.manual_seed(0)
    model = lgvit_fast.create_model(
        "vit_tiny_patch16_224",
        num_classes=2,
        img_size=32,
        patch_size=8,
        embed_dim=32,
        num_heads=2,
        depth=4,
        exits=[1, 3],
    )
    model.class_names = ["cat", "dog"]
    for place in ("run/stage2/best", "sdn/stage1/best", "cifar-run/stage2/best", "model"):
        model.save_pretrained(folder / place)


def _image(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (32, 40, 3), dtype=torch.uint8, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def run_page(page: Path) -> None:
    """Run every block of a page in the current folder; raises what a block raises."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page.read_text()):
        if block.language in ("python", "setup") and not block.reason:
            source = "\n" * block.line + block.code  # so that a traceback names the page's line
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, str(page), "exec"), names)
        elif block.language == "sh":
            for command in commands(block.code):
                check(command) if block.reason else run(command)
