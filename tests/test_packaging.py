"""What is installed and built, and that every missing piece costs speed only."""

import importlib.metadata
import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lgvit_fast
from lgvit_fast import _extension
from lgvit_fast._extension import BuildFacts

ROOT = Path(__file__).parent.parent

USE = """
import torch, lgvit_fast
tokens = torch.arange(6.0)
keep = torch.tensor([False, True, False, True, True, False])
assert lgvit_fast.ops.compact_(tokens, keep) == 3
assert sorted(tokens[:3].tolist()) == [1, 3, 4]
model = lgvit_fast.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2,
    num_classes=5,
).eval()
assert model(torch.randn(3, 3, 32, 32)).shape == (3, 5)
from lgvit_fast import _extension
print(_extension.why_missing(torch.device("cpu")))
"""


def run_python(code, *flags):
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_version_has_one_source():
    assert importlib.metadata.version("lgvit-fast") == lgvit_fast.__version__


def test_kernels_are_a_subpackage():
    assert importlib.util.find_spec("lgvit_fast.kernels") is not None
    assert Path(lgvit_fast.__file__).with_name("py.typed").exists()


@pytest.mark.skipif(_extension.facts() is None, reason="the extension is not built")
def test_facts_of_the_build():
    facts = _extension.facts()
    assert facts.torch.split(".")[:2] == torch.__version__.split(".")[:2]
    assert facts.cxx11_abi == torch.compiled_with_cxx11_abi()
    if facts.cuda:
        assert facts.summary == f"compiled with CUDA {facts.cuda} for {' '.join(facts.cuda_archs)}"
    else:
        assert facts.summary == "compiled without CUDA"


def built(torch_version="2.14.1+cu130", cuda="13.0"):
    return BuildFacts(torch_version, cuda, ("8.0", "9.0", "12.0+PTX"), "gcc", True, "")


@pytest.mark.parametrize(
    ("facts", "running", "cuda", "reason"),
    [
        (built(), "2.14.0+cu130", "13.0", None),
        (built(), "2.14.1+cu132", "13.2", None),
        (built(cuda=None), "2.14.1+cpu", None, None),
        (built(), "2.11.0+cu130", "13.0", "built for torch 2.14.1"),
        (built(), "2.14.1+cu126", "12.6", "has CUDA 12.6"),
        (built(), "2.14.1+cpu", None, "has no CUDA"),
    ],
    ids=["patch", "CUDA minor", "no CUDA", "torch minor", "CUDA major", "CUDA for a CPU torch"],
)
def test_mismatch(facts, running, cuda, reason):
    problem = _extension._mismatch(facts, running, cuda)
    assert problem is None if reason is None else reason in problem


@pytest.mark.parametrize(
    ("capability", "fits"),
    [
        ((8, 0), True),
        ((8, 6), True),
        ((7, 5), False),
        ((10, 0), False),
        ((12, 1), True),
        ((13, 0), True),
    ],
    ids=str,
)
def test_gpu_architectures(monkeypatch, capability, fits):
    monkeypatch.setattr(_extension, "_facts", built())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    problem = _extension._cuda_problem(0)
    assert (problem is None) == fits
    if not fits:
        assert f"this one is {capability[0]}.{capability[1]}" in problem


def test_works_without_the_extension():
    done = run_python("import sys; sys.modules['lgvit_fast._build'] = None\n" + USE)
    assert "the extension is not built; build it" in done.stdout
    assert "RuntimeWarning" not in done.stderr


def test_works_without_triton():
    run_python("import sys; sys.modules['triton'] = None\n" + USE)


def test_extension_of_another_torch_warns_once_and_falls_back():
    pretend = (
        "import sys, types\n"
        "build = types.ModuleType('lgvit_fast._build')\n"
        "build.torch_version, build.cuda_version, build.cuda_archs = '2.3.0', '', ''\n"
        "build.compiler, build.cxx11_abi, build.summary = 'gcc', True, ''\n"
        "sys.modules['lgvit_fast._build'] = build\n"
    )
    done = run_python(pretend + USE)
    assert done.stderr.count("the extension was built for torch 2.3.0") == 1
    assert "pip install --no-build-isolation" in done.stderr
    assert "the extension was built for torch 2.3.0" in done.stdout


@pytest.mark.parametrize("library", ["_C", "_cpu"])
def test_library_that_does_not_load_warns_and_falls_back(monkeypatch, library):
    def load(name):
        if name.startswith(library):
            raise OSError("undefined symbol")
        return True

    monkeypatch.setattr(_extension, "_load_library", load)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    facts = BuildFacts(torch.__version__, torch.version.cuda, (), "gcc", True, "")
    with pytest.warns(RuntimeWarning, match="runs on plain torch: .* undefined symbol"):
        problem, cpu_problem = _extension._load(facts)
    assert problem == cpu_problem
    assert "does not load" in problem


@pytest.mark.parametrize(
    ("capability", "libraries", "loaded"),
    [
        ("AVX512", ["_C", "_cpu_avx512", "_cpu_avx2"], ["_C", "_cpu_avx512"]),
        ("AVX512", ["_C", "_cpu_avx2"], ["_C", "_cpu_avx2"]),
        ("AVX2", ["_C", "_cpu_avx512", "_cpu_avx2"], ["_C", "_cpu_avx2"]),
        ("DEFAULT", ["_C", "_cpu_avx512", "_cpu_avx2"], ["_C"]),
    ],
    ids=["avx512", "no avx512 library", "avx2", "old processor"],
)
def test_one_cpu_library_is_loaded(monkeypatch, capability, libraries, loaded):
    done = []

    def load(name):
        if name in libraries:
            done.append(name)
        return name in libraries

    monkeypatch.setattr(_extension, "_load_library", load)
    monkeypatch.setattr(_extension.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    facts = BuildFacts(torch.__version__, torch.version.cuda, (), "gcc", True, "")
    problem, cpu_problem = _extension._load(facts)
    assert done == loaded
    assert problem is None
    assert (cpu_problem is None) == (len(loaded) == 2)


@pytest.fixture(scope="module")
def setup_script():
    """The functions of setup.py, without building anything."""
    spec = importlib.util.spec_from_file_location("lgvit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A pretended CUDA 13.0 toolkit, reached through a wrapper script in another folder."""
    home = tmp_path / "cuda"
    _script(
        home / "bin" / "nvcc",
        f"""case "$*" in
  *--dryrun*) echo '#$ TOP={home}/bin/..' >&2 ;;
  *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_100\\n' ;;
esac""",
    )
    _script(tmp_path / "path" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:{os.environ['PATH']}")
    return home


def _script(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_finds_the_toolkit_behind_a_wrapper(setup_script, toolkit):
    assert setup_script.find_nvcc() == (toolkit.resolve(), "13.0")
    assert setup_script.default_archs(toolkit) == "8.0 9.0 10.0+PTX"


def test_cuda_home_wins(setup_script, toolkit, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert "elsewhere/bin/nvcc does not run" in setup_script.find_nvcc()


def test_no_toolkit(setup_script, monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_script.find_nvcc() == "no nvcc on PATH and CUDA_HOME is not set"


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [(None, "is built without CUDA"), ("12.6", "nvcc is of CUDA 13.0"), ("13.2", None)],
)
def test_cuda_needs_torch_and_nvcc_of_one_major(setup_script, toolkit, monkeypatch, cuda, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup_script.find_cuda("auto") == (None if reason else "13.0")
    assert setup_script.find_cuda("cpu") is None
    if reason:
        with pytest.raises(SystemExit, match=reason):
            setup_script.find_cuda("cuda")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_unknown_build_mode(setup_script, monkeypatch):
    monkeypatch.setenv("LGVIT_BUILD", "gpu")
    with pytest.raises(SystemExit, match="must be auto, cpu, cuda or none; got 'gpu'"):
        setup_script.build_mode()
