# On a fresh machine with Python 3.11 or newer: `make demo` shows the main job, `make test` runs
# the tests. Both make .venv themselves; what is pinned is in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A file's tests stay together: they share what they made. tests/conftest.py orders the files.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
SOURCES := coat_deploy tests examples docs cli.py

.PHONY: demo test test-fast test-triton check format docs clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-triton: $(VENV)/.dev .venv-triton/.made
	$(BIN)/python -m pytest tests/triton

check: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/.dev
	$(BIN)/python docs/write_cli.py
	$(BIN)/python docs/write_figures.py
	$(BIN)/python docs/write_study.py
	$(BIN)/python docs/write_protocol.py

clean:
	rm -rf $(VENV) demo build *.egg-info

# NVIDIA's tritonserver; its wheel is for the system's python3.11 alone.
.venv-triton/.made: tests/triton/make_server.sh
	tests/triton/make_server.sh .venv-triton
	touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old (expected 3.11 or newer). Run: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable ".[train,cpu,openvino]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable ".[datasets,dev]"
	touch $@
