# make setup   everything that is needed, into .venv (and Debian packages, as root)
# make demo    the letter's donor and consumer on a real mount
# make test    linters, type checker, tests
# make bench   side by side with peers, and page tables of many: a report; BENCH=--quick: less
# make bench-postgres   PostgreSQL's page tables, throughput and connections, each way
# make bench-programs   page tables of php-fpm, multiprocessing and others, had back
# make fuzz    the fuzzers, SECONDS each
# make kills   kill the daemon under load, KILLS times
# make oracle  random programs in a region and in a plain process, PROGRAMS of them
# make soak    mixed load for HOURS, or SECONDS, with SEED; RESTARTS=1 kills daemons too
# make stress  regions come and go in threads and processes, with signals, ROUNDS times
# make docs    the documentation as a site, into build/docs
# make deb     Debian packages, with Debian's tools, into dist/
# make dist    the sdist and the wheel, into dist/
# make test-packages   the Debian packages in a Debian with nothing else (debootstrap)
# make test-ceph   images, in a store of Debian's Ceph (unpacked, not installed)
# make test-ray   libmshare.ray at length, on three nodes: what fails, comes and goes
# make pythons  what the tests of the client want in each other Python that is here
# make lock    choose the versions of what is installed, and their hashes; UPGRADE=1: the newest
# make clean

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The source directories have the packages' names: what is installed is what counts.
export PYTHONSAFEPATH := 1
# Meson and ninja are in the virtual environment.
export PATH := $(BIN):$(PATH)

SOURCES := pyproject.toml meson.build meson_options.txt README.md LICENSE \
	docs/meson.build docs/function.3.in docs/msharefs.toml $(wildcard docs/*.[138]) \
	$(shell find msharefsd libmshare msharetables completions -type f -not -path '*/__pycache__/*')

.PHONY: setup pythons demo test lint check bench bench-postgres bench-programs fuzz kills oracle \
	soak stress docs deb dist test-packages test-ceph test-ray lock clean

setup: $(VENV)/.project

$(VENV)/.system: scripts/system-packages
	scripts/system-packages
	@mkdir -p $(VENV) && touch $@

# Nothing is installed whose hash is not in requirements/, and that goes for what builds
# pyfuse3, too: it comes first, and the build uses what it finds (--no-build-isolation)
# instead of fetching what no file of ours names.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes
LOCKS := $(addprefix requirements/,build.txt runtime.txt web.txt dev.txt docs.txt)

$(VENV)/.dependencies: $(VENV)/.system $(LOCKS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --requirement requirements/build.txt
	$(INSTALL) --no-build-isolation --check-build-dependencies \
		$(patsubst %,--requirement %,$(filter-out %/build.txt,$(LOCKS)))
	@touch $@

$(VENV)/.project: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-index --no-build-isolation \
		--no-deps --force-reinstall .
	@touch $@

demo: setup
	examples/demo

# What the client is for besides the Python that all this runs on.
pythons: $(VENV)/.pythons

$(VENV)/.pythons: $(VENV)/.dependencies scripts/pythons requirements/client.txt
	scripts/pythons $(VENV)
	@touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is to hold whatever holds the pages.
CORPUS := $(addprefix tests/,client/test_sharing.py paging/test_mapping.py \
	paging/test_read_ahead.py oracle/test_oracle.py fuzz/test_fuzz_races.py)

check: setup pythons
	$(BIN)/pytest $(TESTS)
	MSHARE_TEST_BACKING=hugetlb $(BIN)/pytest $(CORPUS)

test: lint check

bench: setup
	$(BIN)/python benchmarks/report.py $(BENCH)

bench-postgres: setup
	$(BIN)/python benchmarks/postgres_modes.py $(BENCH)

bench-programs: setup
	$(BIN)/python benchmarks/programs.py $(BENCH)

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

ROUNDS ?= 10000
stress: setup
	MSHARE_STRESS_ROUNDS=$(ROUNDS) $(BIN)/pytest -o faulthandler_timeout=0 tests/client/test_storm.py

docs: setup
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs build/docs
	@echo build/docs/index.html

deb: $(VENV)/.system
	scripts/deb

dist: $(VENV)/.dependencies
	scripts/dist

test-packages: setup
	MSHARE_TEST_DEBOOTSTRAP=1 $(BIN)/pytest tests/packages/test_packages.py

build/ceph/made: scripts/ceph
	scripts/ceph

test-ceph: setup build/ceph/made
	MSHARE_TEST_STORE=ceph $(BIN)/pytest tests/images/test_images.py tests/images/test_stores.py

test-ray: setup
	$(BIN)/pytest tests/cluster/ray_in_short.py tests/cluster/ray_at_length.py

# uv, because it finds one answer for all Pythons and processors (pip-compile: for the one
# that it runs on). What is in requirements/ stays as it is as long as it fits. Each file
# is bound by those before it, so that they can be installed together.
UV := build/lock/bin/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade) \
	--constraint constraints.txt
lock:
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/pip install --quiet --disable-pip-version-check --require-hashes \
		--requirement requirements/lock.txt
	$(COMPILE) --group lock --output-file requirements/lock.txt
	$(COMPILE) --group build --output-file requirements/build.txt
	$(COMPILE) --constraint requirements/build.txt --extra daemon pyproject.toml \
		--output-file requirements/runtime.txt
	$(COMPILE) --constraint requirements/build.txt --constraint requirements/runtime.txt \
		--extra web pyproject.toml --output-file requirements/web.txt
	$(COMPILE) --constraint requirements/build.txt --constraint requirements/runtime.txt \
		--constraint requirements/web.txt --group dev --output-file requirements/dev.txt
	$(COMPILE) --constraint requirements/build.txt --constraint requirements/runtime.txt \
		--constraint requirements/web.txt --constraint requirements/dev.txt --group docs \
		--output-file requirements/docs.txt
	$(COMPILE) --constraint requirements/dev.txt --group client \
		--output-file requirements/client.txt

clean:
	rm -rf $(VENV) build dist benchmarks/results
