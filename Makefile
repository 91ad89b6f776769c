# The commands of the README. `make setup` needs Python 3.11 or newer with venv, nothing else.
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.8

.DEFAULT_GOAL := help
.PHONY: help setup demo test faults lint bench format lock

help:
	@echo "make setup   .venv with everything pinned in requirements.lock"
	@echo "make demo    from real images of digits to a scored model (needs about 4 minutes on two cores)"
	@echo "make test    the tests (about 9 minutes)"
	@echo "make faults  whole runs killed and gone on with, and slow tests (about 45 minutes)"
	@echo "make lint    ruff, mypy, import rules"
	@echo "make bench   how fast things are here, as ratios (about 35 minutes)"
	@echo "make format  ruff format and fixes"
	@echo "make lock    requirements.lock anew from pyproject.toml"

setup: .venv/ready

# Bytecode is compiled at install: without it every Ray worker would compile ray and torch again.
# DeepSpeed builds without isolation, so that it sees what is installed, and compiles no operators.
.venv/ready: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed, .venv has ' + sys.version"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION) 'setuptools>=77' wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-build-isolation-package deepspeed \
		--compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/enat run configs/digits.yaml

test: setup
	$(BIN)/python -m pytest --reruns 1 -r fER --durations=10

faults: setup
	$(BIN)/python -m pytest -m faults --reruns 1 -r fER --durations=5

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: setup
	$(BIN)/python tests/benchmarks/tokenization.py
	$(BIN)/python tests/benchmarks/training.py
	$(BIN)/python tests/benchmarks/sampling.py
	$(BIN)/python tests/benchmarks/evaluation.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet -o requirements.lock
