PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
CACHES := .pytest_cache .mypy_cache .ruff_cache .hypothesis

.DEFAULT_GOAL := help
.PHONY: help demo dist docs families install outputs quick sweep test test-processors test-oldest test-vision gpu soak check check-format check-lint check-types check-architecture clean

# help: list the targets
help:
	@sed -n 's/^# \([a-z-]*\): /make \1\t/p' $(MAKEFILE_LIST) | expand -t 28

# demo: decompose, train, merge and convert a real model of 135M parameters, and show the results
demo: install
	$(BIN)/python recipes/demo/demo.py

# install: make .venv and install svdconvert with everything into it
install: $(STAMP)

# If the stamp is older than the files that decide what is installed, pip runs again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[all]"
	touch $@

# docs: build the pages of docs/ as a site in build/site; a warning is an error
docs: $(DOCS_STAMP)
	SVDCONVERT_DOCS=1 $(BIN)/python -m pytest -q tests/test_docs.py -k matches_the_registry
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# 60 MB that nothing else needs, so they are not part of the extra `all`.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[docs]"
	touch $@

# dist: build what PyPI gets into dist/, and check it
dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# outputs: run the chain of the README and the notebook on SmolLM2, and put their outputs into them
outputs: install
	OMP_NUM_THREADS=1 $(BIN)/python examples/record.py readme
	OMP_NUM_THREADS=1 $(BIN)/python examples/record.py notebook

# quick: the tests that take less than two seconds, start no other process and download nothing
quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not processes and not network"

# test: run the tests, two at a time; each worker gets one thread of torch's
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not sweep"

# sweep: run the long tests of which `test` runs only one of a kind
sweep: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m sweep

# test-processors: run the tests of the linear algebra with other processors' instructions; SETTINGS=sample: some
test-processors: install
	PYTHON=$(BIN)/python .ci/test-processors $(SETTINGS)

# test-oldest: run the sample of model families with the lowest version of transformers that is allowed
test-oldest: install
	PYTHON=$(BIN)/python .ci/test-oldest

# test-vision: train on rows with images with the processors of released models; installs torchvision
test-vision: install
	PYTHON=$(BIN)/python .ci/test-vision

# gpu: test and measure on a CUDA GPU, with the Python of PYTHON=...; installs and downloads nothing
gpu:
	$(PYTHON) -m pytest -q -W default -p no:cacheprovider tests/gpu
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) benchmarks/gpu.py

# families: check every family of transformers, about half an hour, and write docs/families.md; may be continued
families: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.families.sweep --kept build/families --page docs/families.md

# soak: 25 kills of each command that writes, 100,000 inputs for all parsers, a fault at every 8th call
soak: install
	SVDCONVERT_KILLS=25 SVDCONVERT_FUZZ_INPUTS=100000 SVDCONVERT_FAULTS=8 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
	  tests/commands/test_interruption.py tests/publish/test_interruption.py tests/fuzz tests/faults

# check: the format, lint rules, types and architecture of the code
check: check-format check-lint check-types check-architecture

# check-format: the code is formatted as ruff formats it
check-format: install
	$(BIN)/ruff format --check .

# check-lint: ruff's rules
check-lint: install
	$(BIN)/ruff check .

# check-types: mypy in strict mode
check-types: install
	$(BIN)/mypy --strict svdconvert

# check-architecture: which package imports which, and the size of files and functions
check-architecture: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_architecture.py

# clean: remove what was built or measured; .venv and the downloads in .cache stay
clean:
	rm -rf build dist demo-output *.egg-info $(CACHES)
	find svdconvert tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +
