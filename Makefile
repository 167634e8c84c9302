# Every target first makes .venv and installs the packages that it needs.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
# ONNX Runtime's build: `gpu` if there is an NVIDIA driver, else `cpu`. Set RUNTIME to choose.
RUNTIME ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
# For pip, torch without CUDA has the version that a GPU needs, so it goes too.
OTHER_RUNTIME := $(if $(filter gpu,$(RUNTIME)),onnxruntime torch,onnxruntime-gpu)
# The index of torch's builds without CUDA; empty means the ordinary index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
RECIPE ?= best
RUN ?= runs/$(RECIPE)
IMAGE ?= bn-lenet
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# Three processes for two cores, because many tests wait for a server; the slow files come first.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Our files are UTF-8 in any locale.
export PYTHONUTF8 := 1
# Some containers set this; then each of the tests' hundred servers would compile the service again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help serve train data test test-all tests checks format bench gpu test-lowest test-newest test-elsewhere \
  test-mutants test-docker image lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 with venv is needed; set PYTHON to its path." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# A stamp file for each set of packages and each runtime; a larger set includes the smaller ones.
SERVICE := $(VENV)/.service-$(RUNTIME)
TRAINING := $(VENV)/.training-$(RUNTIME)
DEV := $(VENV)/.dev-$(RUNTIME)

$(VENV)/.runtime-$(RUNTIME): $(BIN)/python
	@$(BIN)/python -m pip uninstall --quiet --yes --disable-pip-version-check $(OTHER_RUNTIME) 2>/dev/null
	@rm -f $(VENV)/.runtime-* $(VENV)/.service-* $(VENV)/.training-* $(VENV)/.dev-*
	@touch $@

$(SERVICE): $(VENV)/.runtime-$(RUNTIME) pyproject.toml $(CONSTRAINTS)
	@echo "Installing the service's packages into $(VENV); this happens once."
	@$(PIP) '.[$(RUNTIME)]'
	@touch $@

$(TRAINING): $(VENV)/.runtime-$(RUNTIME) pyproject.toml $(CONSTRAINTS)
	@echo "Installing the packages for training into $(VENV); this happens once."
	@$(torch)
	@$(PIP) '.[$(RUNTIME),training]'
	@touch $@ $(SERVICE)

$(DEV): $(VENV)/.runtime-$(RUNTIME) pyproject.toml $(CONSTRAINTS)
	@echo "Installing all packages into $(VENV); this happens once."
	@$(torch)
	@$(PIP) '.[$(RUNTIME),training,dev]'
	@touch $@ $(TRAINING) $(SERVICE)

# Without a driver CUDA is useless, and makes torch ten times as large. If the index does not answer
# within three seconds, torch comes from the index of the other packages.
torch = if [ "$(RUNTIME)$$(uname)" = cpuLinux ] && [ -n "$(TORCH_INDEX)" ] && \
  timeout 3 $(BIN)/python -c 'import urllib.request as u; u.urlopen("$(TORCH_INDEX)/torch/")' 2>/dev/null; \
  then $(PIP) --no-deps --index-url $(TORCH_INDEX) torch || true; fi

serve: $(SERVICE)  ## serve the committed model on http://127.0.0.1:8000
	$(BIN)/python -m service

# An interrupted fit is continued; a complete fit is only exported again.
$(RUN)/results.json: | $(TRAINING)
	$(BIN)/python -m training fit --recipe $(RECIPE) --out $(RUN) $(if $(wildcard $(RUN)/config.json),--resume)

train: $(RUN)/results.json  ## fit, export and evaluate RECIPE (best) in the run folder RUN; models/ does not change
	$(BIN)/python -m training export $(RUN) --out $(RUN)/bn_lenet.onnx
	$(BIN)/python -m training evaluate $(RUN)/bn_lenet.onnx

data: $(SERVICE)  ## download the data set into the user's cache, and check its SHA-256
	$(BIN)/python -c 'from training.dataset import load; load()'

test: checks  ## run every check, except the slow tests and the coverage
	$(PYTEST)

# Without the data set many tests are skipped, so the floor of the coverage does not apply.
COVER := --cov $(if $(FASHION_MNIST_DIR)$(wildcard $(HOME)/.cache/bn-lenet/fashion-mnist/*),,--cov-fail-under=0)

test-all: checks  ## also run the slow tests and check the coverage; Hypothesis tries new examples
	$(PYTEST) $(COVER) -m "" --hypothesis-profile search

checks: $(DEV)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

tests: $(DEV)
	$(PYTEST)

# Lint and types belong to the versions of constraints.txt, so these two only run the tests.
test-lowest: $(DEV)  ## run the tests with the oldest versions that pyproject.toml allows
	@mkdir -p .cache
	$(BIN)/python -m uv pip compile --quiet --python $(BIN)/python --resolution lowest-direct \
	  --extra $(RUNTIME) --extra training --extra dev --output-file .cache/lowest.txt pyproject.toml
	$(MAKE) tests VENV=.venv-lowest CONSTRAINTS=.cache/lowest.txt

test-newest:  ## run the tests with the newest versions of all packages
	@mkdir -p .cache && : > .cache/newest.txt
	$(MAKE) tests VENV=.venv-newest CONSTRAINTS=.cache/newest.txt

test-elsewhere: $(DEV)  ## run the tests on other releases of Debian, and the contract tests on arm64, in containers
	./tests/elsewhere.sh

test-mutants: $(DEV)  ## break small modules in many ways, and list the breaks that no test notices
	$(PIP) mutmut
	$(BIN)/mutmut run
	$(BIN)/mutmut results

format: $(DEV)  ## format the code, and fix what ruff can fix
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

bench: $(DEV)  ## print the benchmarks' tables
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.serving

gpu: $(DEV)  ## everything that needs a GPU: tests, timings, the table of docs/performance.md
	$(BIN)/python -m benchmarks.gpu --write docs/performance.md

test-docker: $(DEV)  ## build the image, start it with compose, run the contract tests against it
	./tests/docker.sh

# With buildx, IMAGE is built for x86-64 and arm64: pushed if PUSH is set, else written to dist/.
image:  ## build the container image IMAGE (bn-lenet); with buildx for x86-64 and arm64
	@if docker buildx version >/dev/null 2>&1; then mkdir -p dist && \
	  { docker buildx inspect bn-lenet >/dev/null 2>&1 || docker buildx create --name bn-lenet; } && set -x && \
	  docker buildx build --builder bn-lenet --platform linux/amd64,linux/arm64 --tag $(IMAGE) \
	    $(if $(PUSH),--push,--output type=oci$(comma)dest=dist/bn-lenet.tar) .; \
	else set -x; docker build --tag $(IMAGE) .; fi

comma := ,

lock: $(DEV)  ## write deploy/image/*.txt: the image's packages, with version and digest
	for runtime in cpu gpu; do $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --extra $$runtime --constraint constraints.txt \
	  --custom-compile-command 'make lock' --output-file deploy/image/$$runtime.txt pyproject.toml || exit; done

clean:  ## remove the virtual environments and caches
	rm -rf .venv .venv-* .cache .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist mutants *.egg-info
