# make demo   train a tiny model on this CPU and show what happened
# make test   lint and the whole test suite
# make test-vllm  the tests of the preset cpu-vllm, in an environment of their own
# make test-faults  what happens to runs when processes die, disks fill up and environments are odd
# make test-long  the trainings that take too long for make test
# make test-modes  every recipe in verl's separate_async, and what is stopped there and goes on
# make test-pairs  every two recipes that meet on a stage, trained together
# make test-labs  the labs that take over 20 s of a core
# make test-cluster  a training on two Ray nodes, both on this machine
# make docs   build the documentation into site/
# make mutants  plant small errors in the methods, one at a time: the tests must notice 92 % (hours; SAMPLE=8 tries so many per file)
# make bench  time the methods against verl's functions and a copy of the data
# make clean  remove the environments and everything built

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM_INSTALLED := $(VLLM_VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-vllm test-faults test-cluster test-long test-modes test-pairs test-labs docs bench mutants clean

demo: $(INSTALLED)
	$(BIN)/verl-plugins demo

test: $(INSTALLED) $(DOCS_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --ignore tests/e2e -n 2 --dist loadfile
	$(BIN)/python -m pytest tests/e2e -n 2 --dist loadfile

test-vllm: $(VLLM_INSTALLED)
	$(VLLM_VENV)/bin/python -m pytest -m vllm

test-faults: $(INSTALLED)
	$(BIN)/python -m pytest tests/faults -m faults -n 0

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long tests/e2e -n 2 --dist loadfile

test-modes: $(INSTALLED)
	$(BIN)/python -m pytest -m modes tests/modes -n 2

test-pairs: $(INSTALLED)
	$(BIN)/python -m pytest -m pairs tests/pairs tests/docs/test_pairs_page.py -n 2

test-labs: $(INSTALLED)
	$(BIN)/python -m pytest -m labs tests/e2e/test_labs.py

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster tests/cluster

docs: $(DOCS_INSTALLED)
	$(BIN)/mkdocs build --strict

mutants: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev,mutants]'
	$(BIN)/python tests/mutants/plant.py $(if $(SAMPLE),--sample $(SAMPLE))

bench: $(INSTALLED)
	$(BIN)/python benchmarks/estimator.py
	$(BIN)/python benchmarks/clip_cov.py
	$(BIN)/python benchmarks/vade.py
	$(BIN)/python benchmarks/verifier.py
	$(BIN)/python benchmarks/layer.py

# $(call environment,FOLDER,EXTRA). torch comes first, at the pin of both extras: otherwise verl's requirements choose it.
define environment
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 12) and f"Python 3.10 to 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 …")'
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --upgrade pip
$(1)/bin/python -m pip install --quiet $(TORCH)
$(1)/bin/python -m pip install --quiet -e '.[$(2),dev]'
endef

$(INSTALLED): pyproject.toml Makefile
	$(call environment,$(VENV),cpu)
	@touch $@

# Builds for GPUs of what vLLM brings along keep transformers from being imported; text models need none of the three.
$(VLLM_INSTALLED): pyproject.toml Makefile
	$(call environment,$(VLLM_VENV),cpu-vllm)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev,docs]'
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
