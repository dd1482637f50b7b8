# Every target sets up what it needs: a virtual environment from pinned constraints.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.ready
RAY := $(VENV)/.ray

STUDY ?= demo
TRIALS ?=
WORKERS ?=
DATA ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup sweep plan report test test-slow test-all chaos chaos-cluster check format lint types docs docs-check ui

help: ## show these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

$(SETUP): setup.cfg constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages (several GB the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(RAY): $(SETUP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	@touch $@

setup: $(SETUP) ## create the virtual environment

sweep: $(SETUP) ## run a study: make sweep STUDY=transfer TRIALS=20 WORKERS=2 DATA=path ARGS='...'
	@$(BIN)/caltech-sweep run $(STUDY) $(if $(TRIALS),--trials $(TRIALS)) $(if $(WORKERS),--workers $(WORKERS)) $(if $(DATA),--data $(DATA)) $(ARGS)

plan: $(SETUP) ## say what a study would train: make plan STUDY=transfer
	@$(BIN)/caltech-sweep plan $(STUDY) $(if $(TRIALS),--trials $(TRIALS)) $(if $(DATA),--data $(DATA)) $(ARGS)

report: $(SETUP) ## print the comparison tables of all studies, or of ARGS
	@$(BIN)/caltech-sweep report $(ARGS)

ui: $(SETUP) ## serve the MLflow UI on loopback
	@$(BIN)/caltech-sweep ui $(ARGS)

test: $(SETUP) ## run the default test suite
	@$(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

test-slow: $(RAY) ## run only the slow tests: they start servers, browsers and processes
	@$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow -rs $(ARGS)

test-all: $(RAY) ## run every test, the slow ones too
	@$(BIN)/python -m pytest -q -n auto --dist worksteal -m "slow or not slow" $(ARGS)

chaos: $(SETUP) ## kill a study a hundred times and compare its report: make chaos KILLS=100 SEED=0
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m helpers.chaos $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

chaos-cluster: $(RAY) ## kill nodes and workers of a Ray cluster: make chaos-cluster EVENTS=60 SEED=0
	@OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/chaos_cluster.py $(if $(EVENTS),--events $(EVENTS)) $(if $(SEED),--seed $(SEED))

format: $(SETUP) ## rewrite the code in the project's format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(SETUP) ## check format and lint
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: $(SETUP) ## check types
	@$(BIN)/mypy

docs: $(SETUP) ## write the pages that are made from the code
	@$(BIN)/python docs/build.py

docs-check: $(SETUP)
	@$(BIN)/python docs/build.py --check

check: lint types docs-check test ## what CI runs before the slow tests
