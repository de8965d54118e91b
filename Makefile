.PHONY: install demo test check bench
PYTHON ?= python3
BIN := .venv/bin

# pip resolves torch to the CPU or CUDA build that its index offers; the lock file pins every version.
.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

install: .venv/.installed

demo: install
	$(BIN)/smes demo

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is compared with, without what it asks for itself: torch stays the build that is here.
.venv/.bench-installed: requirements-bench.lock .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-bench.lock
	touch $@

bench: .venv/.bench-installed
	$(BIN)/python -m benchmarks
