# Targets set up the environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
ifeq ($(origin CXX),default)
CXX = c++
endif
SHARE ?= 1
# the oldest release of torch that pyproject.toml promises
OTHER_TORCH ?= $(if $(filter 1,$(SHARE)),torch==2.11.0)
# the environment is for this machine alone: its GPUs, or one architecture without any; `pip install .` builds for all
ifndef TORCH_CUDA_ARCH_LIST
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';')
export TORCH_CUDA_ARCH_LIST := $(or $(GPUS),9.0)
endif

PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check --quiet
READY = $(VENV)/.ready
CPP = $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu csrc/cuda/*.cuh tests/sanitizers/*.cpp tests/cuda_host/*.h tests/cuda_host/*.cpp)

define PEERS
from importlib.metadata import requires
print(*(r.partition(";")[0] for r in requires("cem_fast") if r.endswith('extra == "bench"')), sep="\n")
endef
export PEERS

.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu check lint format docs build clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## train, attack and report on real faces (about 4 minutes on 2 cores)
	@$(PY) -m cem_fast demo

test: $(READY) ## run the tests (at most 10 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not long" --doctest-modules tests cem_fast
	@echo "the operations once more, on the plain torch reference"
	@OMP_NUM_THREADS=1 CEM_FAST_BACKEND=reference $(PY) -m pytest -q -n 2 --dist loadfile tests/ops tests/test_loss.py tests/mixture/test_model.py

bench: $(READY) ## compare speed with other libraries and update docs/results/benchmarks.md (about 20 minutes; BENCH=--quick for 2)
	@$(PY) -c "$$PEERS" | xargs $(PIP) install || echo "make: not every library could be installed: the others are listed as missing"
	@$(PY) -m cem_fast bench --save benchmarks/results --readme docs/results/benchmarks.md $(BENCH)

gpu: $(READY) ## check, test and time this machine's GPU (about 8 minutes)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make: no GPU")'
	@$(PY) -m cem_fast.cli.doctor --device cuda --check
	@$(PY) -m pytest -q -m gpu tests/ops
	@$(PY) -m cem_fast bench --device cuda --quick --save build/gpu
	@$(PY) benchmarks/gpu_profile.py --save build/gpu/profile.txt

check: $(READY) ## run the long proofs: kills, sanitizers, wrong kernels, compiled kernels, the wheel and the sources (with SHARE=1 also under OTHER_TORCH, the oldest torch); 2 hours, or half an hour with SHARE=0.05
	@SHARE=$(SHARE) $(PY) -m pytest -q -m long --share $(SHARE) tests --ignore=tests/kernels
	@$(PY) tests/sanitizers/run.py
	@if [ "$(SHARE)" != 1 ]; then echo "SHARE=$(SHARE): the CUDA kernels were not run under sanitizers"; else $(PY) tests/cuda_host/run.py; fi
	@if $(PY) -c 'import triton' 2>/dev/null; \
	  then $(PY) tests/kernels/proofs.py --share $(SHARE) \
	    && SHARE=$(SHARE) TRITON_INTERPRET=1 CEM_FAST_BACKEND=triton $(PY) -m pytest -q -m long tests/fuzz/test_operations.py \
	    && $(PY) benchmarks/tune_kernels.py --check \
	    && $(PY) tests/aot/collect.py --compiler triton --check --share $(SHARE); \
	  else echo "triton is not installed: its kernels were neither interpreted nor compiled"; fi
	@if ! command -v nvcc >/dev/null; then echo "nvcc is not installed: the CUDA kernels were not compiled"; \
	  elif [ "$(SHARE)" != 1 ]; then echo "SHARE=$(SHARE): the CUDA kernels were not compiled for every architecture"; \
	  elif $(PY) -c 'import triton' 2>/dev/null; then \
	    $(PY) tests/aot/collect.py --compiler nvcc --check && $(PY) tests/aot/gpu_model.py --check; fi
	@$(PY) tests/wheel.py $(if $(OTHER_TORCH),--torch "$(OTHER_TORCH)")

lint: $(READY) ## check style, types and layers, without changing anything
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-logo

docs: $(READY) ## build the documentation in build/docs/html, without a network, warnings as errors
	@$(PY) -m sphinx -q -W --keep-going -n -E -b html docs build/docs/html
	@echo "built: build/docs/html/index.html"

format: $(READY) ## format the sources
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CPP)

build: ## set up the environment and compile the extensions
	@rm -f "$(READY)"
	@$(MAKE) --no-print-directory $(READY)

clean: ## remove what was built; the environment and runs/ stay
	rm -rf build dist *.egg-info cem_fast/*.so cem_fast/_not_built*.txt .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
	rm -f "$(READY)"

$(READY): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "make: Python 3.10 or newer is needed as $(PYTHON) (choose another with PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "make: Python's venv module is missing (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' \
	  || { echo "make: Python's headers are missing (Debian and Ubuntu: apt install python3-dev)"; exit 1; }
	@command -v $(CXX) >/dev/null \
	  || { echo "make: a C++ compiler is needed as $(CXX) (Debian and Ubuntu: apt install g++)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import torch' 2>/dev/null \
	  || echo "Installing PyTorch: up to 3 GB to download and 6 GB on disk where it comes with CUDA, 0.2 GB where it does not"
	@$(PIP) install "$(TORCH)"
	@echo "Installing the other packages (0.1 GB) and building the extension"
	@$(PIP) install "setuptools>=77" wheel "pybind11>=3" ninja numpy
	@$(PIP) install --no-build-isolation -e ".[dev,demo]"
	@touch "$(READY)"
