# Two commands matter: `make demo` runs the main job, `make test` runs every test.
# Both set themselves up: a virtual environment in .venv, and (make test, as root) Debian packages.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PATHS := src tools tests
# Cancellation rules that ruff lacks, run on the modules that have async code at all. ASYNC91x (a checkpoint in
# every async function) would forbid cheap fast paths.
ASYNC_RULES := ASYNC101,ASYNC102,ASYNC103,ASYNC104,ASYNC111,ASYNC112,ASYNC113,ASYNC120,ASYNC121,ASYNC123,ASYNC900
SEED ?= 1
HUNT_SECONDS := $(or $(SECONDS),60)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: all setup demo test check bench sim hunt broken format clean packages

all: check test

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml constraints.txt tools/setup-venv.sh
	@bash tools/setup-venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

packages:
	@bash tools/setup-packages.sh

demo: setup
	@$(BIN)/python -m holdfast.demo

test: setup packages
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup
	@$(BIN)/ruff check $(PATHS)
	@$(BIN)/ruff format --check $(PATHS)
	@$(BIN)/flake8-async --enable=$(ASYNC_RULES) $$(git grep -lE '^ *async def' -- 'src/*.py' 'tools/*.py')
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@echo "check: passed"

format: setup
	@$(BIN)/ruff check --fix $(PATHS)
	@$(BIN)/ruff format $(PATHS)

bench: setup
	@$(BIN)/python -m holdfast.bench
	@$(BIN)/python -m holdfast.bench.export
	@$(BIN)/python -m holdfast.bench.differential
	@$(BIN)/python -m holdfast.bench.checkpoint

sim: setup
	@$(BIN)/clusterd simulate scenarios/pulled-cable --seed $(SEED)

hunt: setup
	@HUNT_SECONDS=$(HUNT_SECONDS) HUNT_BREAK=$(BREAK) $(BIN)/python -m holdfast.bench.hunt

broken: setup
	@$(BIN)/python -m holdfast.bench.broken_rules

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
