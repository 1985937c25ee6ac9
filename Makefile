PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint sweep format bench-solver bench-solver-gpu bench-kernels bench-e2e clean

run: $(VENV)/.ready
	$(BIN)/python run.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy matquant

sweep: $(VENV)/.ready
	$(BIN)/python run.py experiment=methods

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-solver: $(VENV)/.ready
	$(BIN)/python experiments/bench_solver.py

bench-solver-gpu: $(VENV)/.ready
	$(BIN)/python experiments/bench_solver_gpu.py

bench-kernels: $(VENV)/.ready
	$(BIN)/python experiments/bench_kernels.py

bench-e2e: $(VENV)/.ready
	$(BIN)/python experiments/bench_e2e.py

# The environment, made again when what it is made from changes. `make PYTHON=python3.12 run` chooses the interpreter.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
