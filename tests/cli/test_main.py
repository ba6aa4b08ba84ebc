"""The command as a whole: help, exit codes, messages."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from lgvit_fast.cli import COMMANDS, main


def test_help_needs_no_torch():
    code = (
        "import sys; from lgvit_fast.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"lgvit-fast {command}" in capsys.readouterr().out.partition("examples:\n")[2]


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["predict"], ["predict", "m", "x.png", "--batch-size", "0"], ["eval", "m"]],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: lgvit-fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "confidence", "--threshold", "1.5"], "between 0 and 1"),
        (["--policy", "confidence", "--threshold", "0.5,0.6"], "the model has 4 exits"),
        (["--policy", "entropy", "--patience", "2"], "takes no --patience"),
        (["--threshold", "0.5"], "needs --policy"),
        (["--device", "toaster"], "toaster"),
        (["--class-map", "{names}"], "names 2 classes, the model has 7"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_2(saved, tmp_path, capsys, options, message):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n")
    options = [option.format(names=names) for option in options]
    assert main(["predict", saved, "x.png", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_no_model_there_is_one_line_and_1(tmp_path, capsys):
    assert main(["predict", str(tmp_path), "x.png"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lgvit-fast predict: error: no saved model in")
    assert len(error.splitlines()) == 1


def test_a_model_on_the_hub(saved, photos, capsys, monkeypatch):
    asked = []

    def download(name, file, **options):
        asked.append((name, file))
        if name == "someone/else":
            raise OSError("no network")
        return f"{saved}/{file}"

    monkeypatch.setattr("lgvit_fast.checkpoints.hub.hf_hub_download", download)
    assert main(["predict", "hf-hub:someone/digits", str(photos / "deep")]) == 0
    assert asked[0] == ("someone/digits", "config.json")
    capsys.readouterr()
    assert main(["predict", "hf-hub:someone/else", "x.png"]) == 1
    assert "the hub did not give it (no network)" in capsys.readouterr().err
    options = ["--data", "digits", "--save-policy"]
    assert main(["eval", "hf-hub:someone/digits", *options]) == 2
    assert "--save-policy writes to a folder" in capsys.readouterr().err


def test_a_damaged_model_is_one_line_and_1(saved, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        with open(f"{saved}/{name}", "rb") as file:
            (tmp_path / name).write_bytes(file.read())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["predict", str(tmp_path), "x.png"]) == 1
    error = capsys.readouterr().err
    assert "not a whole safetensors file" in error
    assert len(error.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved model"):
        main(["predict", str(tmp_path), "x.png", "--debug"])


def test_it_runs_as_a_module_and_passes_its_exit_code_on(tmp_path):
    command = [sys.executable, "-m", "lgvit_fast", "predict", str(tmp_path), "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


# A shell's background job ignores interrupts, and so would what it starts.
INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lgvit_fast.cli import main
print("ready", flush=True)
sys.exit(main())
"""


@pytest.mark.parametrize("delay", [0.05, 0.2, 1.0, 3.0, 6.0])
def test_an_interrupt_at_any_time_is_one_line_and_130(delay, tmp_path):
    """Also before torch is there, and with loader workers, which get the signal too."""
    options = [
        "train", "--output", str(tmp_path / "run"), "--model", "vit_tiny_patch16_224",
        "--device", "cpu",
        "--model-kwargs", "img_size=32", "patch_size=8", "embed_dim=32", "depth=4", "num_heads=2",
        "--stage1.epochs", "1000", "--workers", "2", "--no-progress", "--no-tensorboard",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    try:
        _, error = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(
                process.pid, signal.SIGKILL
            )  # what outlives its time must not slow the others
    assert process.returncode == 130, error
    assert len(error.splitlines()) == 1, error
    assert error.startswith("lgvit-fast") and "interrupted" in error
