# Needs Python >= 3.11 (with pip) and make. Everything is installed into .venv, once.
#
#   make PYTHON=/path/to/python3.12 test    another Python for a new .venv
#   make JOBS=4 test                        more test processes (JOBS=0: one, no xdist)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
PYTHON ?=
CANDIDATES = $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
TORTURE = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m ""
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help venv demo test torture lint format bench bench-full clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP) ## create .venv and install what is needed (the other targets do so too)

# An existing .venv is kept and brought up to date unless its Python is missing or too old.
# Where ensurepip is missing (Debian without python3-venv), pip is put in by the outer pip.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '$(RECENT)' 2>/dev/null; then \
	    found=; \
	    for python in $(CANDIDATES); do \
	        if $$python -c '$(RECENT)' 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "Python >= 3.11 is needed; none found as: $(CANDIDATES). Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    echo "Creating $(VENV) with $$($$found --version) ..."; \
	    $$found -m venv --clear $(VENV) >/dev/null 2>&1 \
	        || { $$found -m venv --clear --without-pip $(VENV) \
	            && $$found -m pip --python $(BIN)/python install --quiet pip; } \
	        || exit 1; \
	fi
	@echo "Installing cpmm_jax and its tools into $(VENV) (once; takes some minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: $(STAMP) ## fit the digits, print the table, write the figures
	$(BIN)/python -m experiments.demo

test: $(STAMP) ## run the tests and the doctests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

# Strict promotion of dtypes refuses only what would be promoted in silence, so that it goes together
# with each precision: three passes stand for five.
torture: $(STAMP) ## all tests, long ones too: fully optimised, in 64 bits, with NaN as an error
	CPMM_OPTIMISED_TESTS=1 $(TORTURE)
	JAX_ENABLE_X64=1 JAX_NUMPY_DTYPE_PROMOTION=strict $(TORTURE)
	JAX_DEBUG_NANS=1 JAX_NUMPY_DTYPE_PROMOTION=strict $(TORTURE)

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## benchmarks, short form; peers: .venv/bin/pip install -e '.[bench]'
	$(BIN)/python -m benchmarks

bench-full: $(STAMP) ## benchmarks at all sizes; writes benchmarks/README.md
	$(BIN)/python -m benchmarks --full

format: $(STAMP) ## put the code into ruff's format, with what ruff can mend by itself
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
