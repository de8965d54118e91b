.PHONY: soak install demo test check docs bench
PYTHON ?= python3
BIN := .venv/bin

# pip resolves torch to the CPU or CUDA build that its index offers. The lock file pins every version. Python compiles
# each module when it is first imported: compiling all of torch beforehand would take half of the installation. Where
# the environment forbids keeping compiled modules, every process would compile torch again. The compiled loops are made
# here once, by two processes: in the tests many would make the same ones at the same time.
unexport PYTHONDONTWRITEBYTECODE
.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -P -m smes_cli.compile_loops
	touch $@

install: .venv/.installed

# STAY=1: everything stays up until Ctrl-C.
demo: install
	$(BIN)/smes demo $(if $(STAY),--stay)

# Two processes, each with its own servers. Tests that share a costly fixture run in the same process. Each process and
# each of its children has one torch thread: more threads than cores would wait for each other. COVERAGE=1 measures
# coverage, which takes nearly half as long again.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 --dist loadgroup --durations=10 $(if $(COVERAGE),--cov --cov-report=)

# What takes too long for every run.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 --dist loadgroup --durations=10 -m soak

# Strict: a dead link is an error.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The coverage is that of the last `make test COVERAGE=1`.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MKDOCS)
	@if test -f .coverage; then $(BIN)/coverage report; else echo "no coverage yet: run make test COVERAGE=1 first"; fi

# Rewrites what pages take from the code, and builds the site: build/site/index.html. External links are only listed.
docs: install
	$(BIN)/python -P -m smes_cli.configuration_docs docs/reference/configuration.md
	$(BIN)/python -P -m smes_cli.command_docs docs/reference/cli.md
	$(MKDOCS)

# The libraries that benchmarks compare with, without their dependencies: torch stays the installed build.
.venv/.bench-installed: requirements-bench.lock .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-bench.lock
	touch $@

# benchmarks/ is not installed: it is found in the working folder.
bench: .venv/.bench-installed
	$(BIN)/python -m benchmarks
