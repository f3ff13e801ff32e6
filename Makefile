# make run    install into .venv and launch the server with the demo model
# make test   install with the test extras and run the whole suite, on two cores
# make coverage  the same, with the lines that ran in the tests' own process: their Python takes twice as long
# make check  ruff, mypy --strict
# make test-clients  every client of tests/clients/environments in an environment of its own
# make judges        tools that are not ours, each in an environment of its own, against a running server
# make soak   the full counts (about an hour on 2 cores)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# a worker takes whole files, whose servers and models are made once; ARGS="-n 0 --pdb tests/x.py" runs without workers
PYTEST := $(BIN)/python -m pytest -m "not soak and not gpu and not clients" -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: install run test coverage browser test-clients judges check soak clean

install: $(VENV)/.installed

run: install
	$(BIN)/vlmrt launch $(ARGS)

test: $(VENV)/.installed-test browser
	$(PYTEST) $(ARGS)

coverage: $(VENV)/.installed-test browser
	$(PYTEST) --cov --cov-report=term $(ARGS)

# The page is tested in a browser where there is one; nothing else needs it
browser:
	@{ command -v chromium && command -v chromedriver; } >/dev/null || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; } || \
	  echo "No chromium and chromedriver: tests of the page in a browser are skipped (apt-get install chromium chromium-driver)"

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m soak -s $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vlmrt needs Python 3.11 or newer; set PYTHON=python3.11"; exit 1; }
	@test "$$(uname -s)" = Linux || { echo "vlmrt runs on Linux only"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv; } || \
	  { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25"

# torch goes first and alone: a constraints file pins the build that CI and development use
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

test-clients: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m clients tests/clients $(ARGS)

judges: $(VENV)/.installed-test
	$(BIN)/python -m tests.judges.run $(ARGS)

clean:
	rm -rf $(VENV) .build build dist .mypy_cache .ruff_cache .pytest_cache
