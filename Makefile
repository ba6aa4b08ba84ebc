# `make demo` and `make test` need nothing but Python 3.11 or newer: they set up the rest in .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)
NATIVE := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: help install demo test test-fast test-avx2 stress sanitize lint docs smoke-oldest bench gpu-check gpu-test gpu-memcheck clean

help:
	@echo "make demo       train on real scans, exit early, and see what was gained (docs: README.md)"
	@echo "make test       the whole test suite"
	@echo "make test-fast  a slice of it that touches every part, in a minute or so"
	@echo "make test-avx2  what depends on the instruction set, held down to AVX2"
	@echo "make sanitize   the operators' tests and fuzz on a build with address and UB sanitizers"
	@echo "make stress     random tests of everything that must hold, ten minutes of them"
	@echo "make lint       formatting, lint and types"
	@echo "make docs       these pages and the API reference as a site, in site/"
	@echo "make smoke-oldest  a slice of the suite on the oldest supported torch and timm, and Python 3.12"
	@echo "make bench      benchmarks of heads, compaction and model on this machine"
	@echo "make gpu-check  measure what only a GPU can show, against floors and targets, into one json"
	@echo "make gpu-test   the kernels', operators' and engine's tests on the GPU"
	@echo "make gpu-memcheck  every kernel under compute-sanitizer"
	@echo "                (all three: with the torch of PYTHON, nothing is downloaded)"

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

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" --numprocesses=2 --dist=worksteal

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

smoke-oldest: $(STAMP)
	.ci/smoke-oldest

# The compiler's cache is its own: what was compiled for wider instructions must not be met here.
test-avx2: $(STAMP)
	TORCHINDUCTOR_CACHE_DIR=$(abspath build/inductor-avx2) ATEN_CPU_CAPABILITY=avx2 \
		ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=2 \
		--dist=worksteal tests/ops tests/heads tests/inference tests/test_model.py tests/test_segments.py tests/test_watch.py \
		$(foreach name,compiled_segments runtime scaling turns,--ignore=tests/inference/test_$(name).py)

# A package of its own in build/, so that the normal libraries stay as they are.
SANITIZED := build/sanitize/lib
sanitize: $(STAMP)
	LGVIT_BUILD=cpu LGVIT_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build \
		--force --build-base build/sanitize --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests $(SANITIZED)/csrc
	cp -r tests csrc pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && export LGVIT_SANITIZE=address,undefined OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive UBSAN_OPTIONS=print_stacktrace=1 \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" && \
		python -m pytest -q tests/ops && python -m tests.fuzz.ops_fuzz 2500

stress: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds 540 --json stress.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.load_test.faults --requests 10000

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest --benchmark-only --benchmark-columns=median,iqr,rounds

# On a GPU's machine with its own torch, where there may be no network: PYTHON instead of .venv, built
# for this GPU alone and without the kernels of the CPU. GPU_CHECK="--seconds 900 --out FILE" passes options.
GPU_STAMP := build/.gpu-installed
$(GPU_STAMP): pyproject.toml setup.py $(NATIVE)
	TORCH_CUDA_ARCH_LIST="$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')" && \
		export TORCH_CUDA_ARCH_LIST && LGVIT_BUILD=cuda-only $(PYTHON) -m pip install --quiet --no-index --no-deps \
		--no-build-isolation --disable-pip-version-check --editable .
	mkdir -p $(@D) && touch $@

gpu-check: $(GPU_STAMP)
	$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK)

gpu-test: $(GPU_STAMP)
	$(PYTHON) -m pytest -q -m gpu tests/kernels tests/ops tests/inference

gpu-memcheck: $(GPU_STAMP)
	$(PYTHON) -m benchmarks.gpu_check.memcheck

clean:
	rm -rf build dist site *.egg-info $(VENV) .venv-oldest
