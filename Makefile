# `make demo` and `make test` do all their own set-up; it is quick when it is done already.
# PYTHON=python3.12 chooses the interpreter, PHYSIS_CUDA=1 or 0 the build of PyTorch.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# Two test files at a time, each with a process of its own, which is not started again: a test that hangs or crashes would do so once more.
# PYTEST_FLAGS= runs them one after the other.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
DEMO_FLAGS ?=

.PHONY: demo test setup doctor lint types check clean

demo: setup
	$(BIN)/physis demo $(DEMO_FLAGS)

test: setup
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

setup:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 was not found. Fix: install python3 (Debian 12 has 3.11)" >&2; exit 2; }
	@$(PYTHON) setup/bootstrap.py --venv $(VENV)

doctor: setup
	$(BIN)/physis doctor

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types

clean:
	rm -rf $(VENV) .physis build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
