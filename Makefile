# `make run` and `make test` need Python 3.11 or later, pip, make and git, nothing else. Each makes
# its own virtual environment in .venv and installs the pinned versions of constraints.txt there;
# the second call finds it in place and starts at once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The interpreter that makes the environment: `make test PYTHON=python3.13`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# pytest's processes: `make pytest JOBS=8`.
JOBS ?= 2
# More for pytest: `make pytest ARGS='-k llama4 --no-cov'`.
ARGS ?=

# SGLang has an environment of its own: it pins another transformers, and is not in reach of a plain
# extra (11 GB). About 3 minutes and 3 GB the first time.
SGLANG_VENV ?= .venv-sglang
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG_PIP := PIP_CONSTRAINT=constraints-sglang.txt PIP_BUILD_CONSTRAINT=constraints-sglang.txt \
    $(SGLANG_BIN)/python -m pip --disable-pip-version-check install --quiet
pinned_for_sglang = "$(shell sed -n '/^$(1)==/p' constraints-sglang.txt)"

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# torch first and by itself, at the pinned version: a package that asks for any torch must find
# one in place instead of bringing another build of it.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
# FlashInfer imports without a GPU, so that its stub and its signatures are compared with it on any
# machine. `make run` does not install it.
# pyright's wheel carries pyright, and runs it on the machine's `node`. Where there is none, one
# more wheel brings it. (Left alone, pyright would download a node build of its own.)
comma := ,
EXTRAS := test,flashinfer$(if $(shell command -v node),,$(comma)node)
STUBS := $(sort $(patsubst stubs/%/,%,$(dir $(wildcard stubs/*/__init__.pyi))))

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Holds for every pip below, the one that fetches the build backend included (newer pips read the
# second name for that).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# A user's own settings stay out: what is in .venv is what is tested.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

# The checks are told in order, also under `make -j`.
.NOTPARALLEL:
.PHONY: help run test test-fast test-triton test-sglang fmt format-check lint imports types verifytypes stubtest \
    pytest clean

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

run: $(VENV)/.run  ## run one model's experts, routed and checked, on this machine
	$(BIN)/typed-moe run qwen3-30b-a3b --quant fp8_block --tokens 64

test: test-fast test-triton test-sglang  ## every check, in this order

test-fast: format-check lint imports types verifytypes stubtest pytest  ## all but Triton's and SGLang's tiers

fmt: $(VENV)/.test  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(VENV)/.test
	$(BIN)/ruff format --check .

lint: $(VENV)/.test  ## ruff
	$(BIN)/ruff check .

imports: $(VENV)/.test  ## the import contract of pyproject.toml
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.test  ## mypy --strict over the package, the tests, the examples and the stubs
	$(BIN)/mypy
	$(if $(wildcard docs/examples/*.py),$(BIN)/mypy docs/examples)
	$(if $(STUBS),$(BIN)/mypy stubs)

# pyright asks the first `python` on PATH where packages are; for this it has no option.
verifytypes: $(VENV)/.test  ## every public name has a type, says pyright
	PATH="$(abspath $(BIN)):$$PATH" pyright --verifytypes typed_moe --ignoreexternal

# stubtest compares a stub with the library, so it needs the library: a package that is not
# installed here is named and left to the machine that has it. The stubs are of parts, so that what
# is missing from them is no error; what they have is compared.
stubtest: $(VENV)/.test  ## stubs/ against the installed libraries
	$(if $(STUBS),,@echo "stubtest: stubs/ holds no package yet; nothing to compare")
	@for package in $(STUBS); do \
	    if $(BIN)/python -c "import sys, importlib.util as u; sys.exit(u.find_spec('$$package') is None)"; then \
	        list=stubs/$$package/allowlist.txt; test -e $$list || list=stubs/allowlist.txt; \
	        $(BIN)/stubtest --mypy-config-file mypy.ini --allowlist $$list \
	            --ignore-missing-stub --concise $$package; \
	    else \
	        echo "stubtest: $$package is not installed; its stub is not compared here"; \
	    fi; \
	done

pytest: $(VENV)/.test  ## the tests, typing tests included, with coverage
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup --cov --cov-report term $(ARGS)

# A file stays in one process: SGLang's process state is set up once, and the engines, which take as long
# as all the rest, start one after the other. Its warnings are its own. `-p no:cacheprovider`: this
# environment leaves no cache in the checkout that the other's would be taken for.
test-sglang: $(SGLANG_VENV)/.test  ## the tests against the real SGLang, on a machine without a GPU
	$(SGLANG_BIN)/python -m pytest -p no:cacheprovider -W default --numprocesses $(JOBS) --dist loadfile \
	    tests/sglang $(ARGS)

# Triton's interpreter runs the kernels on a CPU. Triton is in SGLang's environment, which needs it.
test-triton: $(SGLANG_VENV)/.test  ## the Triton kernels in Triton's interpreter
	TRITON_INTERPRET=1 $(SGLANG_BIN)/python -m pytest -p no:cacheprovider -W default -q \
	    --numprocesses $(JOBS) tests/kernels/test_fused_routing.py tests/kernels/test_triton_experts.py \
	    tests/kernels/test_deep_gemm.py \
	    tests/cli/test_tune.py::test_the_kernels_run_with_every_tile_that_is_tried \
	    tests/cli/test_tune.py::test_tiles_are_called_in_other_processes

clean:  ## remove the environments and every cache
	rm -rf $(VENV) $(SGLANG_VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -rf .coverage .coverage.* htmlcov build dist
	find python tests stubs -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment, two stamps: what runs the package, and what tests it.

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('typed-moe needs Python 3.11 or later; this is ' + sys.version)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.run

# SGLang's environment. torch first, as above; then SGLang and FlashInfer without what they ask for, for
# which pip prints an error of its resolver's and goes on; then the packages that are imported.
$(SGLANG_VENV)/.test: constraints-sglang.txt tests/sglang/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_PIP) $(call pinned_for_sglang,torch)
	$(SGLANG_PIP) --no-deps $(call pinned_for_sglang,sglang) $(call pinned_for_sglang,flashinfer-python) \
	    $(call pinned_for_sglang,xgrammar)
	$(SGLANG_PIP) -r tests/sglang/requirements.txt
	$(SGLANG_PIP) --no-deps --editable .
	@touch $@
