# Two commands do everything: `make repro` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)
export DVC_NO_ANALYTICS := 1

# One process a core up to four, each on one thread.
QUICK := OMP_NUM_THREADS=1 python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help setup repro test test-unit clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/installed: requirements.txt requirements-no-deps.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned requirements into $(VENV); this takes minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-no-deps.txt
	touch $@

setup: $(VENV)/installed ## the virtual environment with the pinned requirements

repro: setup ## run the pipeline: every stage whose inputs changed, then the table
	python -m looper.params
	dvc repro

test: setup ## all tests: unit, contracts, and the pipeline on a tiny model
	$(QUICK)
	python -m pytest -m slow

test-unit: setup ## the quick tests alone
	$(QUICK)

clean: ## remove the scratch folder of killed runs and the virtual environment
	rm -rf .scratch $(VENV)
