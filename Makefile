# From a fresh clone, each of these does all it needs: a virtual environment in .venv, torch, the build.
#   make test     build and run the tests
#   make bench    build and compare with other implementations (FULL=1: the whole grid, QUICK=1: results only)
#   make gpu      on a machine with a GPU: build, tests, sanitizer and benchmarks there, in 10 minutes;
#                 as it is, with PYTHON, which has all it needs: it installs nothing
#   make emulated test the CUDA kernels without a GPU, over tests/emulator/cuda
#   make example NAME=vit_digits    run examples/vit_digits.py (ARGS: what else to pass to it)
#   make build    compile what changed
#   make check    format, lint, types, and what must hold for sources and objects (tests/static)
#   make clean    remove what was built
#
# TORCH names the torch to install where .venv has none, PYTHON the Python to make .venv with (for `make gpu`, the one
# to run), VENV another environment to use, for example your own, and STAGES some of the stages of `make gpu`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BUILD_TOOLS := "setuptools>=77" ninja "pybind11>=2.13"
CXX_FILES = $(shell find csrc tests \( -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: test bench gpu emulated example build check clean
.DELETE_ON_ERROR:

test: $(VENV)/.ready-test build
	$(BIN)/pytest -q tests

bench: $(VENV)/.ready-bench build
	$(BIN)/python -m fastattn bench

gpu:
	@$(PYTHON) -c 'import torch, pybind11, ninja, setuptools, pytest, pytest_benchmark, hypothesis, matplotlib, rich; \
	  assert int(setuptools.__version__.split(".")[0]) >= 77, "setuptools >= 77 is needed"' || \
	  { echo "make gpu installs nothing: PYTHON=... names a Python that has torch and the packages for the tests"; exit 1; }
	$(PYTHON) benchmarks/gpu.py $(STAGES)

emulated: $(VENV)/.ready-test
	FASTATTN_CUDA=emulate $(BIN)/python setup.py -q build --build-lib build/emulated_cuda
	set -e; for level in sm80 sm90; do PYTHONPATH=build/emulated_cuda FASTATTN_CPU_ISA=$$level \
	  $(BIN)/pytest -q -m "not slow" $$($(BIN)/python tests/cuda_tests.py $$level); done

example: $(VENV)/.ready-examples build
	$(BIN)/python examples/$(NAME).py $(ARGS)

build: $(VENV)/.ready-build
	$(BIN)/python setup.py -q build_ext --inplace

check: $(VENV)/.ready-dev build
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	set -e; for script in tests/static/check_*.py; do $(BIN)/python $$script; done

clean:
	rm -rf build dist *.egg-info fastattn/_C*.so .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastattn needs Python >= 3.10: make PYTHON=... names one"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch stays as it is where there is one; otherwise this downloads it.
$(VENV)/.ready-build: setup.py pyproject.toml | $(BIN)/python
	$(PIP) $(BUILD_TOOLS)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	$(BIN)/python setup.py -q build_ext --inplace
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.ready-%: $(VENV)/.ready-build
	$(PIP) --no-build-isolation --editable ".[$*]"
	touch $@
