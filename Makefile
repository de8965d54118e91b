.PHONY: install demo test check bench
PYTHON ?= python3
BIN := .venv/bin

# pip resolves torch to the CPU or CUDA build that its index offers; the lock file pins every version. Python compiles
# what it imports, once: compiling all of torch beforehand takes half of the install. Where the environment forbids
# keeping what was compiled, every process would compile torch again.
unexport PYTHONDONTWRITEBYTECODE
.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

install: .venv/.installed

demo: install
	$(BIN)/smes demo

# Two processes, each with servers of its own; tests that share a costly fixture stay in one of them. One torch thread
# in each process, theirs and those they start: more than there are cores would spin against each other.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

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
