# make train | test | test-all | check | docs | build | clean. All of them use .venv, which is created on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train test test-all check docs build clean

train: $(VENV)/.installed
	$(BIN)/glassgpt train demo --out runs/demo --overwrite

# Under four minutes on two cores.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

# Adds what is marked slow: kill loops, torchrun restarts, browser sweeps, compilation, benchmark processes.
test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every warning is an error: a dead link, a name that autodoc does not find, a page outside the tree.
docs: $(VENV)/.installed-dev
	rm -rf build/site
	$(BIN)/sphinx-build -W -n -E --keep-going -j 2 -d build/doctrees docs build/site
	@echo "built: build/site/index.html"

build: $(VENV)/.installed-dev
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "glassgpt needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed
