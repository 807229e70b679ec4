# Every target installs what it needs into .venv first. Nothing but python3 >= 3.11, make and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.cfg pyproject.toml

# Brokers are started a hundred times by the suite: compiled once, each serves a third of a second sooner.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup install demo run test long real lint type format bench bench-etcd torture clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gpumgr needs python3 >= 3.11: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 cannot make a virtual environment: on Debian, apt install python3-venv"; exit 1; }

$(VENV)/.server: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[server]'
	@touch $@

$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.server

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.test $(VENV)/.server

$(VENV)/.real: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[real]'
	@touch $@

setup: $(VENV)/.dev            ## everything for working on gpumgr

install: $(VENV)/.server       ## only what running it needs, into .venv

demo: $(VENV)/.server          ## the story on a simulated card, in the terminal; Ctrl-C ends it
	@$(BIN)/gpumgr demo || [ $$? -eq 130 ]

run: $(VENV)/.server           ## the broker on config/consumers.yaml
	@exec $(BIN)/gunicorn -c config/gunicorn.conf.py wsgi:app

test: $(VENV)/.test            ## the whole suite; without `make real` it skips the real servers, and says so
	$(BIN)/pytest -n 4 --dist loadscope --no-loadscope-reorder  # in their order, so that the longest do not come last

long: $(VENV)/.test            ## what is too long for the suite: the hunt for mutants, 2 000 wrong requests, a short torture
	$(BIN)/pytest -n 4 --dist loadscope -m long

real: $(VENV)/.real            ## piper and faster-whisper with their models for the suite, some 700 MB; no GPU needed

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test           ## the figures of docs/design.md; writes bench/results/
	$(BIN)/python -m bench

bench-etcd: $(VENV)/.test      ## a durable lease against one of etcd (Debian: etcd-server); writes bench/results/etcd.json
	$(BIN)/python -m bench.etcd

torture: $(VENV)/.test         ## the promises under kills, 60 s with each order, then every broken broker, which must be caught: 6 min
	$(BIN)/python -m tests.torture --seconds 60 --all

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
