"""What is installed and built, and that every missing piece costs speed only."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
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


needs_extension = pytest.mark.skipif(
    _extension.facts() is None, reason="the extension is not built"
)


@needs_extension
def test_facts_of_the_build():
    facts = _extension.facts()
    assert facts.torch.split(".")[:2] == torch.__version__.split(".")[:2]
    assert facts.stable_target == "2.11"
    assert facts.cxx11_abi == torch.compiled_with_cxx11_abi()
    if facts.cuda:
        assert facts.summary == f"compiled with CUDA {facts.cuda} for {' '.join(facts.cuda_archs)}"
    else:
        assert facts.summary == "compiled without CUDA"


def built(torch_version="2.14.1+cu130", cuda="13.0"):
    return BuildFacts(torch_version, "2.11", cuda, ("8.0", "9.0", "12.0+PTX"), "gcc", True, "")


@pytest.mark.parametrize(
    ("facts", "running", "cuda", "reason"),
    [
        (built(), "2.14.0+cu130", "13.0", None),
        (built(), "2.14.1+cu132", "13.2", None),
        (built(cuda=None), "2.14.1+cpu", None, None),
        (built(), "2.11.0+cu130", "13.0", None),
        (built("2.11.0+cu130"), "3.0.0a0+git", "13.0", None),
        (built(), "2.10.2+cu130", "13.0", "needs torch 2.11 or newer, this is torch 2.10.2"),
        (built(), "2.14.1+cu126", "12.6", "has CUDA 12.6"),
        (built(), "2.14.1+cpu", None, "has no CUDA"),
    ],
    ids=[
        "patch",
        "CUDA minor",
        "no CUDA",
        "oldest",
        "newer",
        "too old",
        "CUDA major",
        "CUDA for a CPU torch",
    ],
)
def test_mismatch(facts, running, cuda, reason):
    problem = _extension._mismatch(facts, running, cuda)
    assert problem is None if reason is None else reason in problem


@pytest.mark.parametrize(
    ("running", "fits"), [("2.14.0", True), ("2.11.0", False), ("3.14.1", False)]
)
def test_what_needs_the_minor_version_it_was_built_for(running, fits):
    problem = _extension._version_mismatch(built(), running)
    assert (problem is None) == fits
    assert fits or f"built for torch 2.14.1+cu130, this is torch {running}" in problem


@needs_extension
def test_the_stable_library_uses_torch_through_its_c_interface_only():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm of binutils")
    (library,) = Path(_extension.__file__).parent.glob("_C.*so")
    command = [nm, "-DC", "--undefined-only", str(library)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "torch_get_const_data_ptr" in symbols  # it does use torch
    assert not re.findall(r"\b(?:at|c10|torch|caffe2)::.*", symbols)


def test_the_stable_sources_include_no_other_interface_of_torch():
    allowed = ("torch/csrc/stable/", "torch/headeronly/")
    for source in (ROOT / "csrc" / "stable").rglob("*.*"):
        headers = re.findall(r"#include <((?:torch|ATen|c10)/.*)>", source.read_text())
        assert all(header.startswith(allowed) for header in headers), source


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


def test_extension_for_a_newer_torch_warns_once_and_falls_back():
    pretend = (
        "import sys, types\n"
        "build = types.ModuleType('lgvit_fast._build')\n"
        "build.torch_version, build.cuda_version, build.cuda_archs = '9.4.0', '', ''\n"
        "build.compiler, build.cxx11_abi, build.summary = 'gcc', True, ''\n"
        "build.stable_target = '9.3'\n"
        "sys.modules['lgvit_fast._build'] = build\n"
    )
    done = run_python(pretend + USE)
    assert done.stderr.count("the extension needs torch 9.3 or newer") == 1
    assert "pip install --no-build-isolation" in done.stderr
    assert "the extension needs torch 9.3 or newer" in done.stdout


# An extension of another torch: what is within the stable ABI runs, with autograd kernels in Python.
OTHER_TORCH = """
from lgvit_fast import _build
_build.torch_version = "2.99.0"
"""
OTHER_TORCH_CHECKS = """
import pytest
compact = torch.ops.lgvit_fast.compact_
assert _extension.why_missing() is None
assert _extension.why_compact_missing(torch.device("cpu")) is None
assert "built for torch 2.99.0" in _extension.why_missing(torch.device("cpu"))
assert not hasattr(torch.ops.lgvit_fast, "lph_pool_cpp")
assert lgvit_fast.ops.compact_(torch.arange(6.0), keep, backend="cpp") == 3

count = torch.empty(1, dtype=torch.int64)
tokens, index = torch.arange(6.0), torch.arange(6)
compact([tokens, index], keep, count)
assert [t._version for t in (tokens, index, count, keep)] == [1, 1, 1, 0]
assert count.item() == 3 and torch.equal(tokens[:3].long(), index[:3])
with pytest.raises(ValueError, match="count must be int64"):
    compact([tokens], keep, torch.zeros(1))
leaf = torch.ones(6, requires_grad=True)
with pytest.raises(RuntimeError, match="has no gradient"):
    compact([leaf * 1], keep, count)
with torch.no_grad():
    compact([leaf * 1], keep, count)
with torch.inference_mode():
    compact([torch.arange(6.0), tokens], keep, count)
assert tokens._version == 2
torch.library.opcheck(compact.default, ([tokens, index], keep, count))
"""


@needs_extension
def test_extension_of_another_torch_serves_what_the_stable_abi_can():
    done = run_python(OTHER_TORCH + USE + OTHER_TORCH_CHECKS)
    assert "RuntimeWarning" not in done.stderr
    assert "the heads' kernels were built for torch 2.99.0" in done.stdout


@pytest.mark.parametrize("library", ["_C", "_dispatch", "_cpu"])
def test_library_that_does_not_load_warns_and_falls_back(monkeypatch, library):
    def load(name):
        if name.startswith(library):
            raise OSError("undefined symbol")
        return True

    registered = []
    monkeypatch.setattr(_extension._autograd_kernels, "register", lambda: registered.append(1))
    monkeypatch.setattr(_extension, "_load_library", load)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    facts = BuildFacts(torch.__version__, "2.11", torch.version.cuda, (), "gcc", True, "")
    with pytest.warns(RuntimeWarning, match="undefined symbol") as warned:
        problem, cpu_problem = _extension._load(facts)
    assert len(warned) == 1
    assert (problem == cpu_problem) == (library == "_C")
    assert (problem is None) == (library != "_C")
    assert registered == [1] * (library == "_dispatch")  # once, and where none is compiled
    for reason in {problem, cpu_problem} - {None}:
        assert "not load" in reason and "pip install" in reason


@pytest.mark.parametrize(
    ("capability", "libraries", "loaded"),
    [
        ("AVX512", ["_cpu_avx512", "_cpu_avx2"], ["_cpu_avx512"]),
        ("AVX512", ["_cpu_avx2"], ["_cpu_avx2"]),
        ("AVX2", ["_cpu_avx512", "_cpu_avx2"], ["_cpu_avx2"]),
        ("DEFAULT", ["_cpu_avx512", "_cpu_avx2"], []),
    ],
    ids=["avx512", "no avx512 library", "avx2", "old processor"],
)
def test_one_cpu_library_is_loaded(monkeypatch, capability, libraries, loaded):
    done = []

    def load(name):
        found = name in ("_C", "_dispatch", *libraries)
        if found:
            done.append(name)
        return found

    monkeypatch.setattr(_extension, "_load_library", load)
    monkeypatch.setattr(_extension.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    facts = BuildFacts(torch.__version__, "2.11", torch.version.cuda, (), "gcc", True, "")
    problem, cpu_problem = _extension._load(facts)
    assert done == ["_C", "_dispatch", *loaded]
    assert problem is None
    assert (cpu_problem is None) == bool(loaded)


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
    for mode in ("cuda", "cuda-only") if reason else ():
        with pytest.raises(SystemExit, match=f"LGVIT_BUILD={mode}: .*{reason}"):
            setup_script.find_cuda(mode)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"


@pytest.mark.parametrize(("mode", "cpu"), [("cuda", True), ("cuda-only", False)])
def test_cuda_alone_leaves_out_the_kernels_of_the_cpu(
    setup_script, toolkit, monkeypatch, mode, cpu
):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv("LGVIT_SANITIZE", raising=False)
    monkeypatch.chdir(ROOT)
    modules, _ = setup_script.extensions(mode)
    names = {module.name.removeprefix("lgvit_fast.") for module in modules}
    assert {"_build", "_C", "_dispatch"} <= names
    assert any(name.startswith("_cpu_") for name in names) == cpu
    library = next(module for module in modules if module.name == "lgvit_fast._C")
    assert any(source.endswith("compact_kernel.cu") for source in library.sources)


def test_unknown_build_mode(setup_script, monkeypatch):
    monkeypatch.setenv("LGVIT_BUILD", "gpu")
    with pytest.raises(SystemExit, match="must be auto, cpu, cuda, cuda-only or none; got 'gpu'"):
        setup_script.build_mode()
