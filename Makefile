# `make demo` answers a prompt with the shipped model; `make test` runs the tests. Both set up what they need.
#
#   PYTHON  the interpreter that makes the virtual environment (3.11 or newer)
#   VENV    where that environment is
#   PINS    exact versions to install with, such as "jax==0.11.2 flax==0.12.10"; give it a VENV of its own
#   PROMPT  what the demo completes
#   ARGS    how pytest runs

PYTHON ?= python3
VENV ?= .venv
PINS ?=
PROMPT ?= def fibonacci(n):
ARGS ?= -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations 10

BIN := $(VENV)/bin
ORACLE := $(VENV)-oracle
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --editable

.PHONY: demo test notebooks oracle oracle-environment lint format clean

demo: $(VENV)/.installed
	@$(BIN)/mimo generate "$(PROMPT)" --model checkpoints/mimo-nano --max-tokens 128 --temperature 0

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(ARGS)

notebooks: $(VENV)/.installed-notebooks
	@$(BIN)/python tests/run_notebooks.py

oracle: $(ORACLE)/.installed-oracle
	@$(ORACLE)/bin/python -m pytest -m oracle

oracle-environment: $(ORACLE)/.installed-oracle

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	rm -rf $(VENV) $(ORACLE) .cache .pytest_cache .ruff_cache .hypothesis build dist

# The stamps: written last, so that an interrupted installation is taken up again. What is printed goes
# to stderr, where it does not mix with the demo's text.
$(VENV)/.installed: pyproject.toml
	@echo "Installing mimo-jax into $(VENV), once; about a minute." >&2
	@$(PYTHON) -m venv $(VENV) >&2
	@$(BIN)/python $(PIP_INSTALL) . $(PINS) >&2
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@echo "Installing mimo-jax and its test tools into $(VENV), once; about a minute." >&2
	@$(PYTHON) -m venv $(VENV) >&2
	@$(BIN)/python $(PIP_INSTALL) ".[dev]" $(PINS) >&2
	@touch $(VENV)/.installed $@

$(VENV)/.installed-notebooks: pyproject.toml
	@echo "Installing mimo-jax, test tools and Jupyter's kernel into $(VENV), once." >&2
	@$(PYTHON) -m venv $(VENV) >&2
	@$(BIN)/python $(PIP_INSTALL) ".[dev,notebooks]" $(PINS) >&2
	@touch $(VENV)/.installed $(VENV)/.installed-dev $@

$(ORACLE)/.installed-oracle: pyproject.toml
	@echo "Installing mimo-jax, test tools, torch and transformers into $(ORACLE), once." >&2
	@$(PYTHON) -m venv $(ORACLE) >&2
	@$(ORACLE)/bin/python $(PIP_INSTALL) ".[dev,oracle]" $(PINS) >&2
	@touch $@
