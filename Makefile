# Every target sets itself up: a machine with Python 3.11+ and make is enough.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: study robustness study-all test check bench clean
.DELETE_ON_ERROR:

VARIANTS := fresh-seeds width-half width-double images-small

study: .venv/study.stamp          ## the main job: the twelve headline claims in under five minutes
	@$(BIN)/gammabeta study run headline --budget brief --deadline 280 --out runs/headline

robustness: .venv/study.stamp     ## the headline claims again: fresh seeds, widths, images; 30 minutes
	@set -e; for variant in $(VARIANTS); do \
	    $(BIN)/gammabeta study run headline --data mnist --variant $$variant; done

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

picture: .venv/dev.stamp          ## the README's picture of the report, from kept rows
	@$(BIN)/gammabeta study judge results > /dev/null
	@$(BIN)/python docs/picture.py

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
