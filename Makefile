# Every target installs what it needs, into .venv.
HOST ?= 127.0.0.1
PORT ?= 3000
TAG ?= stepweave
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# the build of torch: cpu, cuda, or if empty what pip finds (on Linux, PyPI's, which is for CUDA)
TORCH ?=
ifneq ($(filter-out cpu cuda,$(TORCH)),)
$(error TORCH=$(TORCH): it must be cpu or cuda)
endif
TORCH_INDEX_cpu := https://download.pytorch.org/whl/cpu
TORCH_INDEX_cuda := https://pypi.org/simple
TORCH_INDEX ?= $(TORCH_INDEX_$(TORCH))
TORCH_STAMP := $(if $(TORCH),.venv/torch-$(TORCH).stamp)
define need_python
@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found: install one, or set PYTHON=/path/to/python" >&2; exit 1; }
endef
SET_UP := $(if $(filter .venv/bin,$(BIN)),.venv/dev.stamp)
export BENTOML_DO_NOT_TRACK = True

.PHONY: serve wheel test test-full coverage test-diffusers test-gpu bench-gpu check format model evaluate bento image image-test dashboard draw load clean

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
# run continues with the parts that have not passed, unless a file has changed. A single part: make
# test-full PART=pipelines
test-full: .venv/dev.stamp .venv-clients/stamp .venv-node/stamp
	$(BIN)/python -m tests.parts $(PART)

# Coverage of `make test`; fails below the minimum in pyproject.toml. It takes twice the time, and
# may hang on Python 3.11, hence the timeout. As HTML: make coverage COVERAGE=--cov-report=html:build/coverage/html
coverage: .venv/dev.stamp .venv-clients/stamp
	timeout --kill-after=10s 90m $(BIN)/pytest -m "not full and not gpu" --numprocesses 2 --dist loadscope --cov $(COVERAGE)

# On a GPU, or with tiny models on the CPU. BIN=/usr/bin uses the packages installed there, and
# installs nothing.
test-gpu bench-gpu: export PYTHONPATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))

test-gpu: $(SET_UP)
	$(BIN)/python3 -m pytest -m gpu -W default --confcutdir tests/gpu tests/gpu

bench-gpu: $(SET_UP)
	$(BIN)/python3 -m benchmarks.gpu $(BENCH)

# The matrix of pipelines with another diffusers: a version, a wheel or a checkout. Entries that
# fail are named, and classes that have no entry. Some of them: NAMES="flux sana"
test-diffusers: export OMP_NUM_THREADS = 1
test-diffusers: export OMP_WAIT_POLICY = passive
test-diffusers: .venv/dev.stamp
	@test -n "$(DIFFUSERS)" || { echo "Name a version, a wheel or a checkout: make test-diffusers DIFFUSERS=diffusers==0.43.0" >&2; exit 1; }
	rm -rf build/diffusers
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/diffusers "$(DIFFUSERS)"
	PYTHONPATH=build/diffusers:src $(BIN)/python -m tests.pipelines --jobs 2 --folder build/pipelines-of-another --unknown $(NAMES)

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Train the embedded model, its LoRAs and its ControlNet again: three hours on two cores. If
# interrupted, the next run resumes from its checkpoint.
model: .venv/dev.stamp
	$(BIN)/python -m tools.shapes.train
	$(BIN)/python -m tools.shapes.evaluate --card
	$(BIN)/python -m tools.shapes.train_loras
	$(BIN)/python -m tools.shapes.evaluate_loras --card
	$(BIN)/python -m tools.shapes.train_controlnet
	$(BIN)/python -m tools.shapes.evaluate_controlnet --card

evaluate: .venv/dev.stamp
	$(BIN)/python -m tools.shapes.evaluate
	$(BIN)/python -m tools.shapes.evaluate_loras
	$(BIN)/python -m tools.shapes.evaluate_controlnet

# dist/stepweave-*.whl, with the embedded model
wheel: .venv/bin/python
	rm -rf dist build/lib
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

bento: .venv/serve.stamp
	$(BIN)/bentoml build

# The container image, by Docker or podman. Options: make image IMAGE="--build-arg=NAME=VALUE", and
# TORCH=cuda, WITH_COMPILER=1, TORCH_INDEX_URL and TORCH_VERSION
ifneq ($(TORCH),)
image: export TORCH_INDEX_URL ?= $(TORCH_INDEX)
endif
image:
	$(need_python)
	$(PYTHON) -m tools.image --tag $(TAG) build -- $(IMAGE)

# Run it read-only and without privileges, make an image, and drain it
image-test:
	$(need_python)
	$(PYTHON) -m tools.image --tag $(TAG) test $(if $(WITH_COMPILER),--compiler)

# Generate the Grafana dashboard.
dashboard: .venv/dev.stamp
	$(BIN)/python monitoring/dashboard.py

# Draw build/dashboard.png with a server, a load and a Prometheus that it starts. Options: make draw
# DRAW=--help
draw: .venv/dev.stamp
	$(BIN)/python -m monitoring.draw $(DRAW)

# Open-loop capacity test of a running server: make load LOAD="--rates 0.5,1,2"
load: .venv/load.stamp
	$(BIN)/python -m benchmarks.locust --host http://localhost:$(PORT) $(LOAD)

clean:
	rm -rf .venv .venv-clients .venv-node build dist .mypy_cache .ruff_cache .pytest_cache

.venv/bin/python:
	$(need_python)
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Cannot create .venv: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

# Another build of torch than that which is installed
.venv/torch-%.stamp: constraints.txt | .venv/bin/python
	@echo "Installing torch for $* from $(TORCH_INDEX)"
	@rm -f .venv/*.stamp
	$(BIN)/pip uninstall --quiet --yes torch
	$(BIN)/pip install --quiet --constraint constraints.txt --index-url $(TORCH_INDEX) \
		--extra-index-url https://pypi.org/simple torch
	@$(BIN)/python -c 'import sys, torch; cuda = torch.version.cuda; sys.exit(0 if (cuda is None) == ("$*" == "cpu") \
		else f"TORCH=$*: torch {torch.__version__} was installed, not a build for $*: is $(TORCH_INDEX) in reach?")'
	touch $@

.venv/serve.stamp: pyproject.toml constraints.txt setup.py | .venv/bin/python $(TORCH_STAMP)
	@echo "Installing packages into .venv, once, in a minute or more: 1.3 GB, or 5.1 GB with CUDA."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/load.stamp: .venv/serve.stamp
	@echo "Installing Locust into .venv, once."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[load]'
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt setup.py | .venv/bin/python $(TORCH_STAMP)
	@echo "Installing packages for development into .venv, once, in a minute or more: 1.5 GB, or 5.3 GB with CUDA."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/load.stamp .venv/serve.stamp

# Clients for tests whose dependencies conflict with the server's.
.venv-clients/stamp: tests/clients/requirements.txt
	$(need_python)
	@echo "Installing clients for tests into .venv-clients, once: 0.5 GB, half a minute."
	$(PYTHON) -m venv --clear .venv-clients
	.venv-clients/bin/pip install --quiet --no-deps --no-compile --requirement $<
	touch $@

# OpenAI's client for Node; without npm it is not installed, and its test is skipped.
.venv-node/stamp: tests/clients/node/package.json tests/clients/node/package-lock.json
	@command -v npm >/dev/null || echo "npm not found: OpenAI's client for Node is not tested." >&2
	@if command -v npm >/dev/null; then mkdir -p .venv-node && cp $^ .venv-node \
		&& npm ci --prefix .venv-node --ignore-scripts --no-audit --no-fund --loglevel error && touch $@; fi
