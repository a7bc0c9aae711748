# make demo   train a tiny model on this CPU and show what happened
# make test   lint and the whole test suite
# make docs   build the documentation into site/
# make bench  time the methods against verl's functions and a copy of the data
# make clean  remove the environment and everything built

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test docs bench clean

demo: $(INSTALLED)
	$(BIN)/verl-plugins demo

test: $(INSTALLED) $(DOCS_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

docs: $(DOCS_INSTALLED)
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python benchmarks/estimator.py
	$(BIN)/python benchmarks/clip_cov.py
	$(BIN)/python benchmarks/vade.py
	$(BIN)/python benchmarks/verifier.py

# torch comes first, at the pin of the extra `cpu`: otherwise verl's requirements choose it.
$(INSTALLED): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 12) and f"Python 3.10 to 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev,docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
