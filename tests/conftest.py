"""Tests marked `gpu` are skipped where there is no CUDA device; the longest ones are marked `slow`."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch

from tests.browser import Browser, find_chromium

SHARED = (
    "LGVIT_TEST_EXPORTS"  # exports that the processes of one run make once: tests/deploy/exports.py
)

# What `make test-fast` leaves out: whole files, classes or functions, by the processor time they took.
SLOW = (
    "tests/backbones/test_families.py",
    "tests/benchmarks/test_gpu_check.py::TestRehearsal",
    "tests/checkpoints/test_published.py::TestRoundTrip",
    "tests/checkpoints/test_published.py::test_exits_match_exactly",
    "tests/inference/test_engine.py::test_a_change_of_the_model_is_followed",
    "tests/inference/test_engine.py::test_compiled_blocks",
    "tests/kernels/test_interpreter.py",
    "tests/ops/test_dispatch.py::test_environment_variable",
    "tests/scale/test_ray.py",
    "tests/test_docs.py::test_every_snippet_runs",
    "tests/test_docs.py::test_the_notebook_runs",
    "tests/test_model.py::TestCompile",
    "tests/test_packaging.py::test_extension_for_a_newer_torch_warns_once_and_falls_back",
    "tests/test_packaging.py::test_works_without_the_extension",
    "tests/test_packaging.py::test_works_without_triton",
    "tests/test_registry.py::test_names_are_there_whatever_is_imported_first",
    "tests/test_segments.py::test_each_segment_compiles_whole",
    "tests/training/test_checkpoint.py::test_a_kill_during_a_save_leaves_the_previous_checkpoint",
    "tests/training/test_distributed.py",
    "tests/training/test_distill.py::test_an_interrupted_run_goes_on_exactly",
    "tests/training/test_golden_losses.py::test_stage1_loss_and_gradients_of_the_model",
    "tests/training/test_loop.py",
    "tests/training/test_resume.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the processes of xdist inherit it
        os.environ[SHARED] = tempfile.mkdtemp(prefix="lgvit-fast-exports-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    browser = Browser(program)
    yield browser
    browser.close()
