# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: bench demo docs test test-all exhaustive faults soak check lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The main job on real photographs, and a table of what came out.
demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

# The quick tests; `make check` runs all of them. On JOBS cores, each with up to 7 GiB of memory.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest --durations 20 --numprocesses $(JOBS) --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.installed
	$(PYTEST) -m 'not exhaustive'

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The guides and the reference, with the notebooks run: docs/_site/index.html.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_site

# What is promised of killed runs, bad data and hostile input, held by tests; writes the table of it.
faults: $(VENV)/.installed
	$(PYTEST) tests/faults --promises docs/promises.md

# What `make check` leaves out: every format of every encoder family, more faults, more of what others show, too.
exhaustive: $(VENV)/.installed
	$(PYTEST) -m exhaustive

# Twenty minutes undisturbed, then the same with faults all along: about an hour on 2 cores.
SOAK := $(or $(TMPDIR),/tmp)/mpp-soak
soak: $(VENV)/.installed
	rm -rf $(SOAK)
	$(BIN)/python -m tests.faults.soak $(SOAK)

# mpp beside what a user would pick instead: about 45 minutes on 2 cores, on which nothing else should run.
BENCH := .venv-bench
$(BENCH)/.installed: tools/bench/requirements.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tools/bench/requirements.txt
	touch $@

bench: $(VENV)/.installed $(BENCH)/.installed
	$(BIN)/python tools/bench/bench.py --peers $(BENCH)/bin/python --write

check: lint test-all

clean:
	rm -rf $(VENV) $(BENCH) docs/_site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
