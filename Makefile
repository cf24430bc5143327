# Every command of the project; `make help` lists them. Each does its own set-up.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# a process for each core, as tests compute with one thread; each takes half a gigabyte
SPREAD := -n auto --maxprocesses 8 --dist loadfile
READY := $(VENV)/.ready

.PHONY: help setup demo test test-slow slurm-test gpu lint format types docs bench wheel clean

help: ## List the commands
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## Make the virtual environment with pinned versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "robustdyn needs Python 3.11 or newer; $$($(PYTHON) --version) found. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "setting up $(VENV) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## Train on digits with AT, AWP and WCI-LR, and open up robust overfitting in a report
	@$(BIN)/robustdyn-train experiment=demo
	@echo 'Next: open this report in a browser. experiments/demo/README.md explains it.'

test: $(READY) ## Run the tests
	@$(BIN)/python -m pytest $(SPREAD)

test-slow: $(READY) ## Run all tests, the long ones included
	@$(BIN)/python -m pytest -m 'slow or not slow' $(SPREAD)

slurm-test: $(READY) ## Test sweeps on a real SLURM on this machine, from Debian packages
	@tests/slurm/packages.sh || true
	@$(BIN)/python -m pytest -m slurm -rs tests/slurm

gpu: $(READY) ## Correctness, speed and cost on an NVIDIA GPU, in six minutes; results land in experiments/benchmarks/results/
	@$(BIN)/python experiments/benchmarks/gpu.py

reproduce-forks: $(READY) ## Runs, branches of them that differ in one factor, and what each factor removes of the overfitting
	@$(BIN)/robustdyn-train experiment=trunks hydra/launcher=parallel $(SET)
	@$(BIN)/robustdyn-fork experiment=forks checkpoint='multirun/trunks/*/checkpoints/epoch=024.ckpt' hydra/launcher=parallel
	@$(BIN)/robustdyn-study forks multirun/forks

reproduce-%: $(READY) ## One of the papers' figures or tables at small scale, e.g. reproduce-correlation; SET='scale=full ...'
	@$(BIN)/robustdyn-train experiment=$* hydra/launcher=parallel $(SET)
	@$(BIN)/robustdyn-study $* multirun/$*

lint: $(READY) ## Check format, style and which package imports which
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo --no-cache

format: $(READY) ## Correct format and style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

types: $(READY) ## Check types
	@$(BIN)/mypy

docs: $(READY) ## Build the documentation into site/; a warning is an error
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY) ## Run the benchmarks; results land in experiments/benchmarks/results/
	@for script in $(filter-out %/common.py %/curvature_problem.py %/study_loops.py %/gpu.py %/measurement_versions.py,$(wildcard experiments/benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

wheel: $(READY) ## Build wheel and source archive into dist/
	@$(BIN)/python -m build --outdir dist .

clean: ## Remove the environment, caches and built files (runs in outputs/ and multirun/ stay)
	@rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
