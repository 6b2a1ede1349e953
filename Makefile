# Every target installs what it needs, into .venv.
HOST ?= 127.0.0.1
PORT ?= 3000
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
SET_UP := $(if $(filter .venv/bin,$(BIN)),.venv/dev.stamp)
export BENTOML_DO_NOT_TRACK = True

.PHONY: serve test test-full coverage test-gpu bench-gpu check format model evaluate bento dashboard draw load clean

serve: export STEPWEAVE_STATE_DIR ?= $(CURDIR)/build/state-$(PORT)
# accept any model name: many clients have a fixed one
serve: export STEPWEAVE_MODEL_NAMES ?= *
serve: .venv/serve.stamp
	$(BIN)/bentoml serve service.py --host $(HOST) --port $(PORT)

# two test processes on two cores: one torch thread each, which does not spin while it waits
test test-full coverage: export OMP_NUM_THREADS = 1
test test-full coverage: export LOKY_MAX_CPU_COUNT = 1
test test-full coverage: export OMP_WAIT_POLICY = passive
# servers that tests start share compiled bytecode
test test-full coverage: export PYTHONDONTWRITEBYTECODE =
test: .venv/dev.stamp .venv-clients/stamp
	$(BIN)/pytest -m "not full and not gpu" --numprocesses 2 --dist loadscope

# All tests, in parts (tests/parts.py): at most 100 minutes on two cores. If interrupted, the next
# run continues with the parts that
# have not passed, unless a file has changed. A single part: make test-full PART=pipelines
test-full: .venv/dev.stamp .venv-clients/stamp .venv-node/stamp
	$(BIN)/python -m tests.parts $(PART)

# Coverage of `make test`; fails below the minimum in pyproject.toml. It takes twice the time, and
# may hang on Python 3.11, hence
# the timeout. As HTML: make coverage COVERAGE=--cov-report=html:build/coverage/html
coverage: .venv/dev.stamp .venv-clients/stamp
	timeout --kill-after=10s 90m $(BIN)/pytest -m "not full and not gpu" --numprocesses 2 --dist loadscope --cov $(COVERAGE)

# On a GPU, or with tiny models on the CPU. BIN=/usr/bin uses the packages installed there, and
# installs nothing.
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

# Train the embedded model again: two hours on two cores. If interrupted, the next run resumes from
# its checkpoint.
model: .venv/dev.stamp
	$(BIN)/python -m tools.shapes.train
	$(BIN)/python -m tools.shapes.evaluate --card

evaluate: .venv/dev.stamp
	$(BIN)/python -m tools.shapes.evaluate

bento: .venv/serve.stamp
	$(BIN)/bentoml build

# Generate the Grafana dashboard.
dashboard: .venv/dev.stamp
	$(BIN)/python monitoring/dashboard.py

# Draw build/dashboard.png with a server, a load and a Prometheus that it starts. Options: make draw
# DRAW=--help
draw: .venv/dev.stamp
	$(BIN)/python -m monitoring.draw $(DRAW)

# Open-loop capacity test of a running server: make load LOAD="--rates 0.5,1,2"
load: .venv/dev.stamp
	$(BIN)/python -m benchmarks.locust --host http://localhost:$(PORT) $(LOAD)

clean:
	rm -rf .venv .venv-clients .venv-node build .mypy_cache .ruff_cache .pytest_cache

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found: install one, or set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Cannot create .venv: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

.venv/serve.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing packages into .venv, once: 1.3 GB, a minute or more."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing packages for development into .venv, once: 1.5 GB, a minute or more."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/serve.stamp

# Clients for tests whose dependencies conflict with the server's.
.venv-clients/stamp: tests/clients/requirements.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found: install one, or set PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing clients for tests into .venv-clients, once: 0.5 GB, half a minute."
	$(PYTHON) -m venv --clear .venv-clients
	.venv-clients/bin/pip install --quiet --no-deps --no-compile --requirement $<
	touch $@

# OpenAI's client for Node; without npm it is not installed, and its test is skipped.
.venv-node/stamp: tests/clients/node/package.json tests/clients/node/package-lock.json
	@command -v npm >/dev/null || echo "npm not found: OpenAI's client for Node is not tested." >&2
	@if command -v npm >/dev/null; then mkdir -p .venv-node && cp $^ .venv-node \
		&& npm ci --prefix .venv-node --ignore-scripts --no-audit --no-fund --loglevel error && touch $@; fi
