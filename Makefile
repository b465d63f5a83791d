# `make demo` and `make test` need Python >= 3.11 and a C++17 compiler (GCC 12 or newer, or Clang):
# they make their own .venv.
# Install a PyTorch build of your choice into .venv first to have it used instead of PyPI's.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Editable: Python files are used from src/, the compiled module is in .venv. It is rebuilt, in
# build/ and only what changed, when a file that it is made of changed.
INSTALL := $(PIP) --config-settings=build-dir='build/{wheel_tag}' --editable
NATIVE := $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inc')
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(filter-out native/tests/%,$(NATIVE)) \
  $(shell find native -name CMakeLists.txt -o -name '*.cmake')

.PHONY: demo test native-test lint docs clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FedLean needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(SOURCES) | $(VENV)/bin/python
	$(INSTALL) '.[sim]'
	@touch $@

$(VENV)/dev.stamp: $(SOURCES) | $(VENV)/bin/python
	$(INSTALL) '.[dev]'
	@touch $@

BOARDS := experiments/fleets/demo.toml
SMALL := --model resnet8 --fleet $(BOARDS) --rounds 60 --cohort 4 --target-accuracy 0.90 0.95

demo: $(VENV)/demo.stamp
	@rm -rf runs/demo
	$(BIN)/fedlean run fedavg --rounds 150 --target-accuracy 0.90 0.95 --out runs/demo/fedavg
	$(BIN)/fedlean run prunefl --rounds 150 --target-accuracy 0.90 0.95 \
	  --set reconfigure_every=20 --out runs/demo/prunefl
	$(BIN)/fedlean compare runs/demo/fedavg runs/demo/prunefl --out runs/demo/compare.html
	@echo; echo "Ten boards of which two can train the whole of a larger model: who fits what"
	$(BIN)/fedlean plan --model resnet8 --fleet $(BOARDS) --method fedavg prunefl heterofl smartfreeze
	$(BIN)/fedlean run exclusivefl $(SMALL) --out runs/demo/exclusivefl
	$(BIN)/fedlean run smartfreeze $(SMALL) --out runs/demo/smartfreeze
	$(BIN)/fedlean compare runs/demo/exclusivefl runs/demo/smartfreeze --out runs/demo/small-devices.html

# A file's tests stay together, for what they share; those that wait for servers begin.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The C++ tests: as the wheel is built, with address and undefined-behaviour checks, and under
# qemu-aarch64 where it and g++-aarch64-linux-gnu are installed.  Under those checks also random and
# extreme models and calls of the compiled module (tests/native/fuzz.py).
native-test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/native -rA

lint: $(VENV)/dev.stamp
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The site of docs/ and of the experiments' cards, in site/; every code block in them is run before.
docs: $(VENV)/dev.stamp $(VENV)/docs.stamp
	$(BIN)/python -m pytest tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open site/index.html"

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/dev.stamp
	$(INSTALL) '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) runs/demo build dist site
