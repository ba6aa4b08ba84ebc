# `make demo` and `make test` need nothing but Python 3.11 or newer: they set up the rest in .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: help install demo test lint bench gpu-check clean

help:
	@echo "make demo       train on real scans, exit early, and see what was gained (docs: README.md)"
	@echo "make test       the whole test suite"
	@echo "make lint       formatting, lint and types"
	@echo "make bench      benchmarks of heads, compaction and model on this machine"
	@echo "make gpu-check  build for this GPU, run its tests and benchmarks, write one json"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11" timm "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --no-build-isolation --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/lgvit-fast demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest --benchmark-only --benchmark-columns=median,iqr,rounds

gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check

clean:
	rm -rf build dist *.egg-info $(VENV)
