# `make demo` installs the runtime dependencies; every other target also the development ones.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Stamps of the installations: to run the program, to develop it, and to test it with Ray.
INSTALLED := $(VENV)/.step1x-edit-installed
DEVELOP   := $(VENV)/.step1x-edit-develop
CLUSTER   := $(VENV)/.step1x-edit-cluster
# A package index for torch alone: `make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu`
# saves the CUDA download on a machine without a GPU.
TORCH_INDEX ?=

# The upscaler of the tests is in a folder of its own: torchvision of PyPI does not fit the CPU build
# of torch, and what finds it among the packages, such as diffusers, cannot be imported.

# Bytecode is written when a module is first imported: compiling all of the dependencies takes a
# minute, and the hundreds of processes that the tests start would compile ours again and again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-cluster check fix openapi conformance mcpb package check-deploy train clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEVELOP)  ## Create .venv and install the project with everything needed to develop it

define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable '.$(1)'
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(call install)
	touch $@

$(DEVELOP): pyproject.toml constraints.txt
	$(call install,[dev])
	$(PIP) --no-deps --upgrade --target $(VENV)/upscale spandrel torchvision
	touch $(INSTALLED) $@

$(CLUSTER): $(DEVELOP)
	$(PIP) --editable '.[dev,ray]'
	touch $@

demo: $(INSTALLED)  ## Edit a bundled photograph and print the paths of the pictures
	$(BIN)/step1x-edit demo

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup  ## Run the tests (CPU)
	$(PYTEST)

test-all: setup  ## Run the tests, with all cases of the slow ones
	TEST_EXTENT=all $(PYTEST)

test-cluster: $(CLUSTER)  ## Install the extra ray and run the tests with a real Ray cluster
	TEST_CLUSTER=1 $(BIN)/python tests/cluster/run.py

check: setup  ## Lint, check the format, the types and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: setup  ## Apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

openapi: setup  ## Write docs/openapi.json again
	$(BIN)/python scripts/write_openapi.py

conformance: setup  ## Run the official MCP conformance suite against the server
	$(BIN)/python scripts/conformance.py

mcpb: setup  ## Write the bundle for MCP clients to dist/
	$(BIN)/python scripts/write_mcpb.py

package:  ## Build the sdist and the wheel, check them, and edit with the wheel
	scripts/check_package.sh

check-deploy:  ## Check the files in deploy/ with the linters of their formats
	scripts/check_deploy.sh

train: setup  ## Train the embedded demo checkpoint again
	$(BIN)/python scripts/train_demo.py --out src/step1x_edit/model/demo

clean:  ## Remove the environment and the caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
