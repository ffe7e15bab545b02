# `make demo` and `make test` need only Python 3.11+, make and a package index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What slidex itself needs, for the demo; and what its tests, linter and benchmarks need besides.
BASE   := $(VENV)/.installed
STAMP  := $(VENV)/.installed-dev
DEMO   ?= demo-output
# Of an environment with CUDA: a torch built for it, slidex[cuda] and pytest. What .venv has is for CPUs.
GPU_PYTHON ?= python3

.PHONY: demo test lint format bench bench-details gpu-check clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BASE): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit("slidex needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt --editable .
	@touch $@

$(STAMP): $(BASE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt --editable '.[dev]'
	@touch $@

demo: $(BASE)  ## prepare real data, train, evaluate and predict: about two minutes
	$(BIN)/python examples/demo.py --out $(DEMO)

lint: $(STAMP)  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --summary=none

test: lint  ## lint, then every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: $(STAMP)  ## apply ruff's fixes and layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## one table of slidex against its rivals; QUICK=--quick for a part, meant for five minutes
	$(BIN)/python -m benchmarks $(QUICK)

bench-details: $(STAMP)  ## the other tables of docs/performance.md: indexes, schedules, stages of a step: long
	$(BIN)/python -m benchmarks.indexes
	$(BIN)/python -m benchmarks.time_to_accuracy --part indexes
	$(BIN)/python -m benchmarks.time_to_accuracy --part schedules
	$(BIN)/python -m benchmarks.stages

gpu-check:  ## CUDA kernels, head, training and a benchmark on a GPU; GPU_PYTHON=... names a Python with slidex[cuda] and pytest
	$(GPU_PYTHON) -m tests.kernels.cuda.check

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .ruff_cache
