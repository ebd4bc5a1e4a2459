# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv if it is not there.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo flights test test-slow lint format docs bench clean

demo: $(READY)
	$(BIN)/python examples/label_errors.py

flights: $(READY)
	$(BIN)/python examples/flights.py

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ".[docs]"
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/limits.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/fidelity.py
	$(BIN)/python benchmarks/assessment.py

clean:
	rm -rf .venv runs site

# torch first: where pip finds a CPU build, that one is taken, and nothing that follows asks for another.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)
