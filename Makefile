# `make serve` and `make test` do all of their own set-up, in .venv.
HOST ?= 127.0.0.1
PORT ?= 3000
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
SET_UP := $(if $(filter .venv/bin,$(BIN)),.venv/dev.stamp)
export BENTOML_DO_NOT_TRACK = True

.PHONY: serve test test-full coverage test-gpu bench-gpu check format model evaluate bento dashboard draw load clean

serve: export STEPWEAVE_STATE_DIR ?= $(CURDIR)/build/state-$(PORT)
# Any name of a model: there is one, and the clients at hand have the name of another wired in
serve: export STEPWEAVE_MODEL_NAMES ?= *
serve: .venv/serve.stamp
	$(BIN)/bentoml serve service.py --host $(HOST) --port $(PORT)

# Two processes of tests on two cores: a thread of torch each, and none that spins while it waits
test test-full coverage: export OMP_NUM_THREADS = 1
test test-full coverage: export LOKY_MAX_CPU_COUNT = 1
test test-full coverage: export OMP_WAIT_POLICY = passive
# The servers that tests start read what is compiled once
test test-full coverage: export PYTHONDONTWRITEBYTECODE =
test: .venv/dev.stamp .venv-clients/stamp
	$(BIN)/pytest -m "not full and not gpu" --numprocesses 2 --dist loadscope

# All that `test` leaves out, too, in parts (tests/parts.py): within 100 minutes on two cores. Interrupted, it goes on with the
# parts that have not passed, unless a file has changed. Or one of them: make test-full PART=pipelines
test-full: .venv/dev.stamp .venv-clients/stamp .venv-node/stamp
	$(BIN)/python -m tests.parts $(PART)

# Which lines of the package `make test` runs: it fails below the floor in pyproject.toml. It takes twice the time, and may hang on
# Python 3.11, hence the limit. As a page: make coverage COVERAGE=--cov-report=html:build/coverage/html
coverage: .venv/dev.stamp .venv-clients/stamp
	timeout --kill-after=10s 90m $(BIN)/pytest -m "not full and not gpu" --numprocesses 2 --dist loadscope --cov $(COVERAGE)

# On a GPU, or in small on the CPU. With BIN=/usr/bin, say, they take what is installed there and install nothing.
test-gpu bench-gpu: export PYTHONPATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))

test-gpu: $(SET_UP)
	$(BIN)/python3 -m pytest -m gpu -W default --confcutdir tests/gpu tests/gpu

bench-gpu: $(SET_UP)
	$(BIN)/python3 -m benchmarks.gpu $(BENCH)

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Train the embedded model anew: two hours on two cores; interrupted, it goes on where it stood.
model: .venv/dev.stamp
	$(BIN)/python -m tools.shapes.train
	$(BIN)/python -m tools.shapes.evaluate --card

evaluate: .venv/dev.stamp
	$(BIN)/python -m tools.shapes.evaluate

bento: .venv/serve.stamp
	$(BIN)/bentoml build

# Write the Grafana dashboard anew from its code.
dashboard: .venv/dev.stamp
	$(BIN)/python monitoring/dashboard.py

# Draw the dashboard from a server, a load and a Prometheus that it starts: build/dashboard.png. Other options: make draw DRAW=--help
draw: .venv/dev.stamp
	$(BIN)/python -m monitoring.draw $(DRAW)

# Open-loop capacity test of a running server: make load LOAD="--rates 1,2,4 --seconds 20"
load: .venv/dev.stamp
	$(BIN)/python -m benchmarks.locust --host http://localhost:$(PORT) $(LOAD)

clean:
	rm -rf .venv .venv-clients .venv-node build .mypy_cache .ruff_cache .pytest_cache

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Stepweave needs Python 3.11 or 3.12; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "No virtual environment: install Debian's python3-venv?" >&2; exit 1; }

.venv/serve.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv: 1.3 GB and a minute or more, once."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv, with what the tests need: 1.5 GB and a minute or more, once."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/serve.stamp

# Clients whose dependencies conflict with ours; tests run them from here.
.venv-clients/stamp: tests/clients/requirements.txt
	@test -n "$(PYTHON)" || { echo "The tests' clients need Python 3.11 or 3.12; name one with PYTHON=..." >&2; exit 1; }
	@echo "Installing other makers' clients into .venv-clients: 0.5 GB and half a minute, once."
	$(PYTHON) -m venv --clear .venv-clients
	.venv-clients/bin/pip install --quiet --no-deps --no-compile --requirement $<
	touch $@

# OpenAI's client for Node. Without npm it is not there, and the test that asks it says so.
.venv-node/stamp: tests/clients/node/package.json tests/clients/node/package-lock.json
	@command -v npm >/dev/null || echo "There is no npm: OpenAI's client for Node will not be checked." >&2
	@if command -v npm >/dev/null; then mkdir -p .venv-node && cp $^ .venv-node \
		&& npm ci --prefix .venv-node --ignore-scripts --no-audit --no-fund --loglevel error && touch $@; fi
