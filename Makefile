# The commands of the project. `make demo` and `make test` need nothing but this folder: what is missing
# on the machine is installed first (or named, where that takes rights that you have not got).

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := build/stamps
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq --no-input

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PYTHON
# Reference data that is too large for the repository, where there is any. Tests that need it skip
# with a reason where it is missing.
ifndef FRAMEQUILT_SHARED
  ifneq ($(wildcard shared/golden ../shared/golden),)
    export FRAMEQUILT_SHARED := $(abspath $(dir $(firstword $(wildcard shared/golden ../shared/golden))))
  endif
endif

ENGINE_FILES := $(shell find engine/src engine/include python/bindings -type f \
                  \( -name '*.cc' -o -name '*.h' \) 2>/dev/null)
ENGINE_DIRS  := $(shell find engine/src engine/include python/bindings -type d 2>/dev/null)
CMAKE_FILES  := CMakeLists.txt $(wildcard third_party/*.cmake)

.PHONY: help setup build cpp demo test test-arm test-tsan pytest lint format stubs clean

help:
	@echo "make setup   install what is missing, then the package with its tools into $(VENV)"
	@echo "make demo    answer questions about a video clip"
	@echo "make test    every test and every check"
	@echo "make test-arm  the C++ tests for 64-bit Arm, in an emulator; not part of make test"
	@echo "make test-tsan  all C++ tests under ThreadSanitizer; not part of make test"
	@echo "make build   the C++ library, its programs and tests (build/dev), and the Python module"
	@echo "make pytest  the Python tests alone"
	@echo "make lint    formatting, clang-tidy, ruff, types, stubs"
	@echo "make format  apply the formatting"
	@echo "make stubs   write the type stubs of the compiled module"
	@echo "make clean   remove what was built ($(VENV) stays)"

# --- setup: each step leaves a stamp and is done again only when what it depends on has changed ----

$(STAMP)/system: .ci/system-packages
	@mkdir -p $(STAMP)
	@.ci/system-packages
	@touch $@

$(VENV)/.tools: $(STAMP)/system
	@echo "setup: creating $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install 'scikit-build-core>=0.10' 'pybind11==3.1.0'
	@touch $@

# The dependencies come from pyproject.toml alone, and pip builds the module on the way.
$(VENV)/.packages: pyproject.toml $(VENV)/.tools
	@echo "setup: building the module and installing the packages of pyproject.toml"
	@$(PIP) install --no-build-isolation -e '.[dev,video]'
	@touch $@ $(VENV)/.module

$(VENV)/.module: $(ENGINE_FILES) $(ENGINE_DIRS) $(CMAKE_FILES) $(VENV)/.packages
	@echo "setup: building the module"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

setup: $(VENV)/.module

# --- work -----------------------------------------------------------------------------------------

cpp: $(STAMP)/system
	@cmake --preset dev >build/dev-configure.log 2>&1 || { cat build/dev-configure.log; exit 1; }
	@grep -E 'CUDA backend' build/dev-configure.log
	@cmake --build build/dev

build: cpp setup

demo: setup
	@$(BIN)/python -m framequilt.demo.show

test: $(STAMP)/system
	@.ci/test

test-arm: $(STAMP)/system
	@.ci/arm

test-tsan: $(STAMP)/system
	@.ci/tsan

pytest: setup
	@$(BIN)/python -m pytest

build/dev/compile_commands.json: $(STAMP)/system $(CMAKE_FILES) $(ENGINE_DIRS)
	@cmake --preset dev >build/dev-configure.log 2>&1 || { cat build/dev-configure.log; exit 1; }
	@touch $@

lint: setup build/dev/compile_commands.json
	@$(BIN)/python .ci/lint.py

format: setup
	@find engine tests python/bindings -name '*.cc' -print0 -o -name '*.h' -print0 | xargs -0r $(BIN)/clang-format -i
	@$(BIN)/ruff check --fix --select I --quiet python tests .ci
	@$(BIN)/ruff format --quiet python tests .ci

stubs: setup
	@$(BIN)/python .ci/stubs.py

clean:
	rm -rf build dist demo-output
