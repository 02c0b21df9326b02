# `make demo` and `make test` set up everything that they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEVICE ?= cpu
JOBS ?= 2

.PHONY: demo why test test-long lint format setup clean

demo: $(VENV)/.installed
	$(BIN)/reprise generate "Once upon a time" --echo --max-tokens 250
	$(BIN)/reprise generate "47 + 38 =" --echo --max-tokens 4

# What goes wrong in engines on new hardware, and what answers it here: docs/why.md, run.
why: $(VENV)/.installed
	$(BIN)/python tools/why.py

# A module's tests stay together: what they share is made once. Modules begin in the order of
# tests/conftest.py; xdist's own begins with those of many tests, and ends with the longest of few.
XDIST := -n $(JOBS) --dist loadscope --no-loadscope-reorder

# What one run finds, the next one finds: examples and the order of sets are the same each time.
test: lint $(VENV)/.installed-sim
	PYTHONHASHSEED=0 $(BIN)/python -m pytest $(XDIST) --device $(DEVICE)

# All combinations of faults, executors and modes, of which test has every pair; clusters of Ray. Examples are random.
test-long: lint $(VENV)/.installed-sim $(VENV)/.installed-ray
	$(BIN)/python -m pytest $(XDIST) --device $(DEVICE) --long

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed-test

# torch comes first: pinned, so that another package's open range does not pull a larger build.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): downloads torch (0.2 GB for CPUs alone, some 3 GB with CUDA, which"
	@echo "is what Linux gets unless torch is there or pip is told otherwise) and 0.1 GB of others."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[server]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,lint]'
	touch $@

# The simulated accelerator, for tests. Without a C++ compiler it says so, and they are skipped.
$(VENV)/.installed-sim: $(VENV)/.installed-test sim/pyproject.toml $(wildcard sim/csrc/*)
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e ./sim
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m reprise_sim.build
	touch $@

# 75 MB, which only tests of several minutes need.
$(VENV)/.installed-ray: $(VENV)/.installed-test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[ray]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info sim/build sim/*.egg-info
