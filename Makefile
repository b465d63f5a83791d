# `make demo` and `make test` need Python >= 3.11 and nothing else: they make their own .venv.
# Install a PyTorch build of your choice into .venv first to have it used instead of PyPI's.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test lint docs clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FedLean needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(SOURCES) | $(VENV)/bin/python
	$(PIP) --editable '.[torch,sim]'
	@touch $@

$(VENV)/dev.stamp: $(SOURCES) | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/demo.stamp
	@rm -rf runs/demo
	$(BIN)/fedlean run fedavg --rounds 150 --target-accuracy 0.90 0.95 --out runs/demo/fedavg
	$(BIN)/fedlean run prunefl --rounds 150 --target-accuracy 0.90 0.95 \
	  --set reconfigure_every=20 --out runs/demo/prunefl
	$(BIN)/fedlean compare runs/demo/fedavg runs/demo/prunefl --out runs/demo/compare.html

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The pages in docs/ are plain Markdown; every code block in them and in the README is checked.
docs: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) runs/demo build dist
