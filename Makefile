# `make demo` and `make test` set up .venv on a fresh machine (Python 3.11 or later, pip), then do their job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test test-all lint clean

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/compress run --passes prune,ptq,trt --out $(DEMO)

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
