# The commands of the README. `make setup` needs Python 3.11 or newer with venv, nothing else.
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.8

.DEFAULT_GOAL := help
# Without bytecode every process of the tests and every Ray worker would compile this code again.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup demo test test-all faults fault-tests campaign lint bench docs format lock

help:
	@echo "make setup     install everything pinned in requirements.lock into .venv"
	@echo "make demo      train and score a model on real images of digits (3 to 5 minutes on two cores)"
	@echo "make test      run the tests (about 5 minutes on two cores)"
	@echo "make test-all  run the tests and the slow tests, and those of stores on a second S3 server"
	@echo "make faults    kill, corrupt and resume real runs, against an uninterrupted one (about two hours)"
	@echo "make lint      run ruff, mypy and the import rules"
	@echo "make bench     measure the speed of this machine: one table of ratios, all figures as JSON (35 to 45 minutes)"
	@echo "make docs      build the documentation site into build/site, and fail on broken links"
	@echo "make format    apply ruff format and fixes"
	@echo "make lock      recompute requirements.lock from pyproject.toml, and tests/localstack.lock"

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

# Two processes of tests. Each has its own Ray cluster; the one that is idle takes over tests of the other.
PYTEST := $(BIN)/python -m pytest --reruns 1 -r fER
SIDE_BY_SIDE := -n 2 --dist worksteal

test: setup
	$(PYTEST) $(SIDE_BY_SIDE) --durations=10

test-all: setup .localstack/ready
	$(PYTEST) -m 'not faults' $(SIDE_BY_SIDE) --durations=10
	ENAT_TEST_S3=$(CURDIR)/.localstack/bin/python $(PYTEST) -m 'not faults' $(SIDE_BY_SIDE) tests/pipelines/storage tests/pipelines/artifacts

# A second S3 server for the tests of stores. Its packages conflict with ours, so it has an environment of its own (170 MB).
.localstack/ready: tests/localstack.lock .venv/ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .localstack
	$(BIN)/uv pip install --quiet --python .localstack/bin/python --require-hashes --compile-bytecode -r tests/localstack.lock
	@touch $@

# First every known behaviour, then a seeded campaign. SLICE='--slice 1 --seed TEXT' runs a random part of each, of about a minute.
faults: fault-tests campaign

fault-tests: setup
	$(PYTEST) -m faults --durations=5 $(SLICE)

# A campaign that is interrupted continues with the same command.
COMMIT = $(shell git rev-parse --short HEAD)
campaign: setup
	$(BIN)/python tests/faults/campaign.py --seed $(COMMIT) --faults 500 --flips 3000 --inputs 300 --folder runs/faults-$(COMMIT) $(SLICE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: setup
	$(BIN)/python tests/benchmarks/run_all.py

docs: setup
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d build/site-doctrees . build/site
	@echo "build/site/index.html"

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra docs --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet -o requirements.lock
	printf 'localstack-core[base-runtime]==4.6.0\ncbor2<5.7\n' | $(BIN)/uv pip compile - --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --quiet -o tests/localstack.lock
