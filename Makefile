# Every target sets itself up: a machine with Python 3.11+ and make is enough.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: study study-all test check bench clean
.DELETE_ON_ERROR:

# Every activation, Jacobians, vanishing gradients: those of the headline claims that fit.
study: .venv/study.stamp          ## the main job: headline claims, decided in under five minutes
	@$(BIN)/gammabeta study run act-all jacobian-one vanishing-depth --deadline 240 --out runs/headline

study-all: .venv/study.stamp      ## every experiment at budget small
	@$(BIN)/gammabeta study run all --out runs/all

test: .venv/dev.stamp             ## all tests
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: .venv/dev.stamp            ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: .venv/study.stamp          ## time and memory beside PyTorch's own layers
	@$(BIN)/python -m benchmarks

clean:                            ## remove what these commands made, runs excepted
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gammabeta needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name one: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv

.venv/study.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (once; a few minutes)" >&2
	@$(PIP) -e ".[study,report]"
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (once; a few minutes)" >&2
	@$(PIP) -e ".[dev]"
	@touch $@ .venv/study.stamp
