# Everything runs in .venv, which the first target that needs it makes, with uv if it is there, else with pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(1)/bin/python -m pip install --quiet --disable-pip-version-check
INSTALL = $(if $(shell command -v uv),uv pip install --quiet --python $(1)/bin/python,$(PIP))

# TORCH=cpu installs the small build of PyTorch, without CUDA.
TORCH ?=
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.PHONY: help bench demo docs test test-all exhaustive faults soak check lint clean

help:  ## what each target does
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(filter cpu,$(TORCH)),$(call INSTALL,$(VENV)) torch torchvision --index-url $(CPU_WHEELS))
	$(call INSTALL,$(VENV)) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## pretrain, fine-tune and export on real photographs, with a table of what came out
	$(BIN)/python tools/demo.py

# Each of the JOBS processes takes a core and up to 7 GiB of memory.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest --durations 20 --numprocesses $(JOBS) --dist worksteal

test: $(VENV)/.installed  ## the quick tests
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.installed  ## nearly all tests
	$(PYTEST) -m 'not exhaustive'

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed  ## the website with guides, reference and notebooks, in docs/_site
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_site

faults: $(VENV)/.installed  ## tests of killed runs, bad data and hostile input; writes docs/promises.md
	$(PYTEST) tests/faults --promises docs/promises.md

exhaustive: $(VENV)/.installed  ## the tests that `make check` leaves out
	$(PYTEST) -m exhaustive

SOAK := $(or $(TMPDIR),/tmp)/mpp-soak
soak: $(VENV)/.installed  ## twenty minutes undisturbed, then with faults all along: an hour on 2 cores
	rm -rf $(SOAK)
	$(BIN)/python -m tests.faults.soak $(SOAK)

BENCH := .venv-bench
$(BENCH)/.installed: tools/bench/requirements.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(call INSTALL,$(BENCH)) --requirement tools/bench/requirements.txt
	touch $@

bench: $(VENV)/.installed $(BENCH)/.installed  ## speed beside other projects: 45 minutes on 2 quiet cores
	$(BIN)/python tools/bench/bench.py --peers $(BENCH)/bin/python --write

check: lint test-all  ## what CI runs

clean:  ## remove what make and the tools made
	rm -rf $(VENV) $(BENCH) docs/_site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
