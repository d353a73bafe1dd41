# Every target makes the environment it needs; all that a machine must have is Python >= 3.11 (and a C compiler for
# the fast noise kernel; without one the same numbers come from numpy, slower).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
WORKERS ?= 2
TYPED = build/typed
SOURCES = mfsde scenarios analysis verification examples benchmarks tests setup.py

.DEFAULT_GOAL = help
.PHONY: help env demo demo-small examples figures verify theory orders coverage test lint format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## create .venv with mfsde and everything the other targets need

$(STAMP): pyproject.toml setup.py constraints.txt mfsde/_noise.c mfsde/_activation.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	@touch $@

demo: $(STAMP)  ## train the digits network, store runs/digits.zarr, draw runs/digits.png (about a minute)
	$(BIN)/python examples/digits.py

demo-small: $(STAMP)  ## the same in a few seconds
	$(BIN)/python examples/digits.py --small --folder runs/small

examples: $(STAMP)  ## run every example in its short form, into runs/examples
	mkdir -p runs/examples
	for name in rates chaos entropy plots limit family calibration; do $(BIN)/python examples/$$name.py --small --folder runs/examples || exit 1; done
	for file in examples/figure_*.py; do $(BIN)/python $$file --small --folder runs/examples || exit 1; done
	$(BIN)/python examples/theory.py --small
	cd runs/examples && MPLBACKEND=agg $(CURDIR)/$(BIN)/python $(CURDIR)/examples/convergence.py

figures: $(STAMP)  ## the figures of the source documents, into docs/gallery (about half an hour)
	for file in examples/figure_*.py; do $(BIN)/python $$file --folder docs/gallery || exit 1; done

verify: $(STAMP)  ## hold every statement of the source documents against measurements, then plant every fault
	mkdir -p build
	$(BIN)/mfsde verify --json build/verification.json --overwrite
	$(BIN)/mfsde verify --self-test --quick

theory: $(STAMP)  ## write docs/theory.md from the statements in verification/
	$(BIN)/python -c "from mfsde.verification import report; print(report.page(), end='')" > docs/theory.md

test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

# Static tools cannot follow the folder mapping of an editable install: they see a normal one.
lint: $(STAMP)  ## ruff, and mypy --strict on the installed package
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	rm -rf build/lib* $(TYPED)
	$(BIN)/python -m pip install -q --no-deps --target $(TYPED) .
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p mfsde

format: $(STAMP)  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP)  ## speed beside other libraries and the machine's limits (20 minutes): build/bench.json, docs/performance.png
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks plot

orders: $(STAMP)  ## the orders of the limit's schemes, as the tables of docs/limit.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.orders

coverage: $(STAMP)  ## what the 95 % intervals of rates cover, over hundreds of repeats (about half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build *.egg-info mfsde/*.so
