# Every target makes what it needs: a virtual environment in .venv, then its own packages.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# ONNX Runtime's build: `gpu` where an NVIDIA driver answers, else `cpu`. Set RUNTIME to choose.
RUNTIME ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
OTHER_RUNTIME := $(if $(filter gpu,$(RUNTIME)),onnxruntime,onnxruntime-gpu)
RECIPE ?= best
RUN ?= runs/$(RECIPE)
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

# A stamp for each set of packages and each runtime; a larger set holds the smaller ones.
SERVICE := $(VENV)/.service-$(RUNTIME)
TRAINING := $(VENV)/.training-$(RUNTIME)
DEV := $(VENV)/.dev-$(RUNTIME)

$(VENV)/.runtime-$(RUNTIME): $(BIN)/python
	@$(BIN)/python -m pip uninstall --quiet --yes --disable-pip-version-check $(OTHER_RUNTIME) 2>/dev/null
	@rm -f $(VENV)/.runtime-* $(VENV)/.service-* $(VENV)/.training-* $(VENV)/.dev-*
	@touch $@

$(SERVICE): $(VENV)/.runtime-$(RUNTIME) pyproject.toml constraints.txt
	$(PIP) --editable '.[$(RUNTIME)]'
	@touch $@

$(TRAINING): $(VENV)/.runtime-$(RUNTIME) pyproject.toml constraints.txt
	$(PIP) --editable '.[$(RUNTIME),training]'
	@touch $@ $(SERVICE)

$(DEV): $(VENV)/.runtime-$(RUNTIME) pyproject.toml constraints.txt
	$(PIP) --editable '.[$(RUNTIME),training,dev]'
	@touch $@ $(TRAINING) $(SERVICE)

serve: $(SERVICE)  ## serve the committed model on http://127.0.0.1:8000
	$(BIN)/python -m service

train: $(TRAINING)  ## fit, export and evaluate RECIPE (best) in a run folder; promotes nothing
	$(BIN)/python -m training fit --recipe $(RECIPE) --out $(RUN)
	$(BIN)/python -m training export $(RUN) --out $(RUN)/bn_lenet.onnx
	$(BIN)/python -m training evaluate $(RUN)/bn_lenet.onnx

test: $(DEV)  ## run every check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadgroup

format: $(DEV)  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV)  ## print the benchmarks' tables
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.serving

test-docker: $(DEV)  ## build the image, start it with compose, run the contract tests against it
	./tests/docker.sh

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info
