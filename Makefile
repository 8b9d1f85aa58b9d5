# Every target sets up .venv first (once); `make demo` or `make test` can be the first command on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
PYTEST := $(RUN) -m pytest -q
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.inc' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format bench build clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup:  ## create .venv and install everything
	@VENV=$(VENV) $(PYTHON) scripts/setup_env.py

setup-all:
	@VENV=$(VENV) $(PYTHON) scripts/setup_env.py --overlays
.PHONY: setup-all

demo: setup  ## fine-tune a real small MoE on this machine and compare its answers
	@$(RUN) -m scripts.demo.run

test: setup-all lint-only  ## lint, types and tests, the families also on other transformers releases
	@for overlay in .cache/overlays/transformers-*; do \
	  echo "tests/models with $${overlay##*/}"; \
	  PYTHONPATH=$$overlay $(PYTEST) -m "not slow" tests/models || exit 1; \
	done
	@$(PYTEST) -m "not slow" tests

test-all: setup-all lint-only  ## the same with the slow tests
	@$(PYTEST) tests

lint: setup lint-only  ## ruff, clang-format and mypy

lint-only:
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES),true)
	@$(RUN) -m mypy
.PHONY: lint-only

format: setup  ## rewrite the sources in the house format
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .
	@$(if $(CXX_FILES),$(VENV)/bin/clang-format -i $(CXX_FILES),true)

SANITIZED := build/sanitize
sanitize: setup  ## kernel tests (AVX2) and thread pool under Address-, UndefinedBehavior- and ThreadSanitizer
	@mkdir -p build
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DKT_SFT_SANITIZE=address,undefined -DPython_EXECUTABLE=$(abspath $(RUN)) \
	  -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir) >$(SANITIZED).log || (cat $(SANITIZED).log; exit 1)
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build $(SANITIZED) >>$(SANITIZED).log || (cat $(SANITIZED).log; exit 1)
	@LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  KT_SFT_ISA=avx2 KT_SFT_EXTENSION=$$(ls $(SANITIZED)/_C*.so) \
	  $(PYTEST) --capture=sys -p tests.sanitize.extension -m "not slow" -k "not amx and not avx512" \
	  tests/ops tests/weights/test_packed_form.py
	@$(PYTEST) tests/sanitize
.PHONY: sanitize

# With a .venv: its extension. Without: kt_sft/_C*.so, built by $(PYTHON) with the packages that it has, no network.
GPU_RUN := $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))
test-gpu: $(if $(wildcard $(RUN)),setup,build-in-place)  ## tests of the CUDA paths; builds with what is installed
	@$(GPU_RUN) -m pytest -q tests/gpu

IN_PLACE := build/in_place
build-in-place:
	@mkdir -p build
	@export PATH="$$($(PYTHON) -c 'import os, sys; print(os.path.dirname(sys.executable))'):$$PATH"; \
	  (cmake -S . -B $(IN_PLACE) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	    -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	    -Dpybind11_DIR="$$($(PYTHON) -m pybind11 --cmakedir)" && cmake --build $(IN_PLACE) && \
	  cmake --install $(IN_PLACE) --prefix .) >$(IN_PLACE).log 2>&1 || (cat $(IN_PLACE).log; exit 1)
.PHONY: test-gpu build-in-place

bench: setup  ## one MoE layer beside the limits of this machine and its peers
	@$(RUN) -m benchmarks

build: setup  ## wheel in dist/
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m pip wheel --quiet --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

clean:  ## remove build results (keeps .venv and downloads)
	@rm -rf kt_sft/_C.*.so build dist demo_output .pytest_cache .mypy_cache .ruff_cache
