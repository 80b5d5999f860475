PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CACHES := .pytest_cache .mypy_cache .ruff_cache .hypothesis

.DEFAULT_GOAL := help
.PHONY: help demo install test test-processors soak check check-format check-lint check-types check-architecture clean

# help: list the targets
help:
	@sed -n 's/^# \([a-z-]*\): /make \1\t/p' $(MAKEFILE_LIST) | expand -t 28

# demo: decompose, train, merge and convert a real 135M model, and show what happened
demo: install
	$(BIN)/python recipes/demo/demo.py

# install: make .venv and install svdconvert with everything into it
install: $(STAMP)

# The stamp is newer than the files that decide what is installed, or pip runs again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[all]"
	touch $@

# test: run the tests, two at a time; each worker gets one thread of torch's
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# test-processors: run the tests of the linear algebra with other processors' instructions
test-processors: install
	PYTHON=$(BIN)/python .ci/test-processors

# soak: kill every verb twenty times, at moments of chance, and compare the bytes
soak: install
	SVDCONVERT_KILLS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/commands/test_interruption.py

# check: everything that can be said about the code without running it
check: check-format check-lint check-types check-architecture

# check-format: the layout of the code, as ruff formats it
check-format: install
	$(BIN)/ruff format --check .

# check-lint: ruff's rules
check-lint: install
	$(BIN)/ruff check .

# check-types: mypy in strict mode
check-types: install
	$(BIN)/mypy --strict svdconvert

# check-architecture: the floors, the size of files and functions
check-architecture: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_architecture.py

# clean: remove what was built or measured; .venv and the downloads in .cache stay
clean:
	rm -rf build dist demo-output *.egg-info $(CACHES)
	find svdconvert tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +
