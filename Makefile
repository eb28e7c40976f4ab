# make demo: train and evaluate the small model on the data in the package, two cores, some minutes
# make test, make check: what every change must pass
# make test-gpu: the tests that need a GPU; make bench-gpu PART=1 (then 2): the measurements that docs/benchmarks.md lacks
# GPU_PYTHON names an interpreter that has all packages, where none can be installed: make test-gpu GPU_PYTHON=python3
# make test-torch: the tests with the oldest and the newest supported torch, each in an environment of its own
# make docs: the documentation site in build/site
# PYTHON names the interpreter for the environment, e.g. make PYTHON=python3.12 demo; WORKERS, processes for the tests

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 3
BIN := $(VENV)/bin

GPU_PYTHON ?= $(BIN)/python
GPU_READY := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.ready-dev)
PART ?= 1
OUT ?= gpu
ONLY ?=

TORCH_VERSIONS ?= 2.11.0 2.15.0

.PHONY: demo docs environment test test-gpu bench-gpu test-torch check style types format clean

demo: $(VENV)/.ready
	$(BIN)/openm6 demo

environment: $(VENV)/.ready-dev

# Bytecode is kept even where the environment forbids it: programs that tests start would compile the package again.
test: $(VENV)/.ready-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# One process: several would share the memory of the GPU, and compile the same kernels at once.
test-gpu: $(GPU_READY)
	$(GPU_PYTHON) -m pytest -m gpu --durations=0 --durations-min=1 --continue-on-collection-errors

bench-gpu: $(GPU_READY)
	$(GPU_PYTHON) -m benchmarks gpu --part $(PART) --out $(OUT) $(if $(ONLY),--only $(ONLY))

test-torch: $(TORCH_VERSIONS:%=test-torch-%)

test-torch-%:
	$(PYTHON) tools/make_venv.py $(VENV)-torch-$* 'torch==$*' -e '.[dev]'
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)-torch-$*/bin/python -m pytest -n $(WORKERS) --dist worksteal

check: style types

style: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

docs: $(VENV)/.ready-dev
	$(BIN)/python -m sphinx -b html -W --keep-going docs build/site

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-torch-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml tools/make_venv.py
	$(PYTHON) tools/make_venv.py $(VENV) -e '.[report]'
	touch $@

$(VENV)/.ready-dev: pyproject.toml tools/make_venv.py
	$(PYTHON) tools/make_venv.py $(VENV) -e '.[dev]'
	touch $@ $(VENV)/.ready
