# Every target says what it does: `make help`.
VENV ?= .venv
BIN = $(VENV)/bin
export VENV

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint types arch test check bench gallery survey quickstart clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup:  ## Create .venv and install the package with what tests and examples need
	scripts/setup.sh test dev examples

fmt:  ## Format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint:  ## Check format, lint rules and the size of files and functions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/gates/size.py

types:  ## Check types
	$(BIN)/python tests/gates/layout.py build/layout
	$(BIN)/basedpyright --pythonpath $(BIN)/python

arch:  ## Check that imports point down
	$(BIN)/python tests/gates/layout.py build/layout
	cd build/layout && $(abspath $(BIN))/lint-imports --config ../../pyproject.toml --no-cache

test:  ## Run the tests
	$(BIN)/python -m pytest

check:  ## Install, lint, types, arch, test: all that CI runs
	scripts/check.sh

bench:  ## Measure time and memory; writes benchmarks/results/
	$(BIN)/python benchmarks/attention_cpu.py
	$(BIN)/python benchmarks/compile_time.py

gallery:  ## Survey transformers, and timm and x-transformers if installed; writes docs/gallery.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.models.gallery

survey:  ## Survey generation with every causal language model; writes docs/generation_survey.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.models.generation_survey

quickstart:  ## Install and run the example on a real pretrained model
	scripts/quickstart.sh

clean:  ## Remove what the tools left behind; keeps .venv
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
