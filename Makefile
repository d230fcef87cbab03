# Two commands for a newcomer: `make serve` and `make test`. The rest is what CI runs.
PORT ?= 8000
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS_SERVE := cpu,kernels,import
EXTRAS_TEST := $(EXTRAS_SERVE),test,deploy

.PHONY: serve test check parity faults clean redis-server check-deploy monitoring-tools drill-p0 drill-p1 drill-p2 image-test bench-gate

serve: $(VENV)/.serve
	@$(BIN)/python -m kernels.build >/dev/null
	@# One thread for numpy's matrix products (the shipped model's import): two would fight with ours on a busy machine.
	@OPENBLAS_NUM_THREADS=1 MILLRACE_PORT=$(PORT) exec $(BIN)/millrace up

test: $(VENV)/.test redis-server
	@$(BIN)/python -m kernels.build >/dev/null
	$(BIN)/python -m pytest -q -m "not torch" --ignore=tests/deploy --ignore=tests/drills $(PYTEST_ARGS)

# The queue's tests run against a real server: installed where that is allowed, asked for where it is not.
redis-server:
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq redis-server >/dev/null; } || \
	  { echo "the tests need redis-server or valkey-server, and it could not be installed here (Debian: apt install redis-server)"; exit 1; }

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Real processes killed and stopped under live streams, minutes long. FAULTS_ARGS='--help' for what it takes.
faults: $(VENV)/.test redis-server
	@$(BIN)/python -m kernels.build >/dev/null
	$(BIN)/python -m tests.faults $(FAULTS_ARGS)

# What is deployed, without a cluster: manifests, scaling, Redis as shipped, alerts and their routes, dashboards.
check-deploy: $(VENV)/.test redis-server monitoring-tools
	@command -v kubectl >/dev/null || { echo "manifests are rendered by kubectl (1.27 or later), which is not installed"; exit 1; }
	$(BIN)/python -m pytest -q tests/deploy tests/drills

# A real installation, a real fault, and the tier's alerts coming and going: tests/drills. DRILL_ARGS='--help' for what it takes.
drill-p0 drill-p1 drill-p2: $(VENV)/.test redis-server monitoring-tools
	@$(BIN)/python -m kernels.build >/dev/null
	$(BIN)/python -m tests.drills $(@:drill-%=%) $(DRILL_ARGS)

# Debian's packages come with services: nobody asked for those.
monitoring-tools:
	@{ command -v promtool && command -v amtool; } >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends prometheus prometheus-alertmanager >/dev/null && \
	    { systemctl disable --quiet --now prometheus prometheus-alertmanager 2>/dev/null || true; }; } || \
	  { echo "alerts are tested with promtool and amtool, which could not be installed here (Debian: apt install prometheus prometheus-alertmanager)"; exit 1; }

# Builds the images and runs them, sealed, with a worker killed in mid-stream (docs/containers.md): minutes the first time.
# IMAGE_ARGS=--compose also starts docker-compose.yml, on its own ports.
image-test: $(VENV)/.images redis-server
	$(BIN)/python -m tests.images $(IMAGE_ARGS)

# Is the engine as fast as in another checkout of this repository? make bench-gate BASE=../main
bench-gate: $(VENV)/.serve
	$(BIN)/python -m scripts.bench_gate $(BASE)

parity: $(VENV)/.parity
	@$(BIN)/python -m kernels.build >/dev/null
	$(BIN)/python -m pytest -q -m torch tests/parity tests/bench

# One stamp for each set of packages, so that a second run starts at once and a changed pyproject.toml installs again.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS_SERVE)]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS_TEST)]"
	@touch $@ $(VENV)/.serve

$(VENV)/.check: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS_TEST),check]"
	@touch $@ $(VENV)/.test $(VENV)/.serve

$(VENV)/.images: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS_TEST),images]"
	@touch $@ $(VENV)/.test $(VENV)/.serve

$(VENV)/.parity: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS_TEST),parity]"
	@touch $@ $(VENV)/.test $(VENV)/.serve

clean:
	rm -rf $(VENV) kernels/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
