# Needs Python 3.10 or newer and make, nothing else. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# Processes that tests run in, side by side, and one thread in each.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: install demo test test-fast test-newest lint bench docs site

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/sae-lens-alloc demo --overwrite

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not slow"

test-newest:
	PYTHON=$(PYTHON) scripts/test_newest.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install
	$(BIN)/python -m benchmarks benchmarks/results/cpu.json --parts centre

docs: install
	$(BIN)/python docs/render.py

# Every link and every anchor is checked: one that leads nowhere ends it.
site: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
