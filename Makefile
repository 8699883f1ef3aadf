# The commands of this repository. `make` lists them; nothing is needed but git, make and Python with venv.

PYTHON ?= python3
VENV ?= .venv
METHODS ?= neuclip
DEMO_ARGS ?=
# Files of tests side by side, one more than cores, for some wait for a cluster or a kill, and at most four; one file's
# tests share what is slow to make. tests/conftest.py has them begin in order.
TEST_WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores + 1 : 4)))
PYTEST_ARGS ?= -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?= small
# Of reproduce-datacomp: SCALE is demo, demo-small, small, medium, large or xlarge; SET, if given, one of the paper's sets.
SCALE ?= demo
SET ?=
REPRODUCE_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_RUNS := $(METHODS:%=runs/demo-%)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all tests reproduce-datacomp parity lint style types format bench doctor clean

help:  ## List these commands
	@echo "usage: make COMMAND [PYTHON=python3.12] [METHODS=\"openclip neuclip\"]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Create .venv and install everything into it (once; again when pyproject.toml changes)

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) is not on PATH. Install Python 3.10 or later, or name one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$($(PYTHON) --version) is too old. Name Python 3.10 or later: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot create environments. On Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): about 3.5 GB to download the first time, most of it torch. Some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --upgrade pip
	@# The demo's pictures come from npm packages; where there is no npm, pip brings one. Of 20,000 modules Python compiles
	@# those that are used when they are: a minute less.
	extras=demo,dev,deepspeed,audit,spark,language; command -v npm >/dev/null || extras=$$extras,npm; \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-compile -e ".[$$extras]"
	@touch $@

demo: setup  ## Train on real clip art for five to ten minutes, evaluate, and compare METHODS side by side
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/neuclip demo-data demo-data
	@for method in $(METHODS); do \
	  echo "$(BIN)/neuclip train demo --objective.name $$method --run-dir runs/demo-$$method $(DEMO_ARGS)"; \
	  $(BIN)/neuclip train demo --objective.name $$method --run-dir runs/demo-$$method $(DEMO_ARGS) || exit $$?; \
	done
	$(BIN)/neuclip report $(DEMO_RUNS) --output runs/demo-report

test: setup style  ## Run every check: ruff, then mypy beside the tests
	@$(MAKE) --no-print-directory -j2 types tests

test-all: export PYTEST_ARGS += -m ""
test-all: test  ## The same with the long tests, that others stand for in `make test`: an hour

tests: setup
	@# One thread each: workers have the cores, and OpenMP's threads spin while they wait for one. Some tests run make
	@# themselves, which shall not look for this one's job slots.
	MAKEFLAGS= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(PYTEST_ARGS)

reproduce-datacomp: setup  ## From a published list to a report beside the published numbers; SCALE=demo, SET=cc3m, ...
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/neuclip reproduce $(or $(SET),$(SCALE)) $(REPRODUCE_ARGS)

parity: setup  ## Hold every engine to one process over all objectives and options: an hour
	NEUCLIP_PARITY=1 $(BIN)/python -m pytest tests/distributed/test_engines.py -k whole_product

lint: style types  ## Check style, formatting and types

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup  ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## Every benchmark in small; BENCH_ARGS="loss --repeats 3" for one in full
	$(BIN)/python tools/bench.py $(BENCH_ARGS)

doctor: setup  ## Check that this machine can train, and say what to mend
	$(BIN)/neuclip doctor

clean:  ## Remove .venv and caches; runs/ and demo-data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find neuclip_scale tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
