# Every target makes what it needs: a virtual environment in .venv, then its own packages.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# ONNX Runtime's build: `gpu` where an NVIDIA driver answers, else `cpu`. Set RUNTIME to choose.
RUNTIME ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve train test format bench test-docker clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 24

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON to its path." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.service: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[$(RUNTIME)]'
	@touch $@

$(VENV)/.training: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[$(RUNTIME),training]'
	@touch $@ $(VENV)/.service

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[$(RUNTIME),training,dev]'
	@touch $@ $(VENV)/.training $(VENV)/.service

serve: $(VENV)/.service  ## serve the committed model on http://127.0.0.1:8000
	$(BIN)/python -m service

train: $(VENV)/.training  ## fit the best recipe into a run folder; promotes nothing
	$(BIN)/python -m training fit $(ARGS)

test: $(VENV)/.dev  ## run every check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadgroup

format: $(VENV)/.dev  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev  ## print the benchmarks' tables
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.serving

test-docker: $(VENV)/.dev  ## build the image, start it with compose, run the contract tests against it
	./tests/docker.sh

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info
