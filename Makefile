# Everything a newcomer or CI needs. `make` alone lists it.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed
IMAGES ?=
PROCESSES ?= 1
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.DEFAULT_GOAL := help
.PHONY: help demo test test-long check format clean

help:
	@echo "make demo                   bucket of real images -> shards -> encoder -> report (some minutes)"
	@echo "make demo IMAGES=PLACE      the same with your own: a folder, or s3://bucket/prefix"
	@echo "make test                   the whole test suite (make check is part of CI)"
	@echo "make check                  lint (Python, shell, YAML, Dockerfile), formatting, types"
	@echo "make test-long              long trials, with the figures they print"
	@echo "make format                 let ruff rewrite what it can"

# constraints.txt holds the versions that the tests ran on; pyproject.toml says what is allowed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m demo.run --images "$(IMAGES)" --processes $(PROCESSES)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -s
	$(BIN)/python -m benchmarks.learning

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -z '*.sh' '*.sbatch' 'deploy/env/*.env' .ci/run | xargs -0 -r $(BIN)/shellcheck
	git ls-files -z '*.yml' '*.yaml' .yamllint | xargs -0 -r $(BIN)/yamllint --strict
	git ls-files -z '*Dockerfile' | xargs -0 -r $(BIN)/hadolint

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
