# Two commands for a newcomer: `make serve` and `make test`. The rest is what CI runs.
PORT ?= 8000
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS_SERVE := cpu,kernels,import
EXTRAS_TEST := $(EXTRAS_SERVE),test

.PHONY: serve test check parity clean

serve: $(VENV)/.serve
	@$(BIN)/python -m kernels.build >/dev/null
	@# One thread for numpy's matrix products (the shipped model's import): two would fight with ours on a busy machine.
	@OPENBLAS_NUM_THREADS=1 MILLRACE_PORT=$(PORT) exec $(BIN)/millrace up

test: $(VENV)/.test
	@$(BIN)/python -m kernels.build >/dev/null
	$(BIN)/python -m pytest -q -m "not torch" $(PYTEST_ARGS)

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

parity: $(VENV)/.parity
	@$(BIN)/python -m kernels.build >/dev/null
	$(BIN)/python -m pytest -q -m torch tests/parity

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

$(VENV)/.parity: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS_TEST),parity]"
	@touch $@ $(VENV)/.test $(VENV)/.serve

clean:
	rm -rf $(VENV) kernels/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
