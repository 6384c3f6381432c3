# `make` lists what there is.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SITE := $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs .

.DEFAULT_GOAL := help
.PHONY: help demo test test-whole test-long check format bench docs pictures clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'wagontrain needs Python 3.11 or later: make PYTHON=python3.12 ...'; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## train LeNet on real digits over 2 worker processes
	$(BIN)/wagontrain run examples/mnist.py --workers 2 --strategy data-parallel

test: $(READY)  ## run the tests, save for whole trainings
	$(BIN)/python -m pytest -m 'not whole and not long'

test-whole: $(READY)  ## train to the end by the commands a person types, on hosts of a test bed
	$(BIN)/python -m pytest -n 0 -m whole

check: $(READY)  ## lint, types, layers, links of the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(SITE) docs/_build/links -b dummy -t links

test-long: $(READY)  ## a hundred harms to workers and servers of one run, by chance
	$(BIN)/python -m pytest -n 0 -m long -o faulthandler_timeout=2000

format: $(READY)  ## format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## compare with plain PyTorch; writes benchmarks/results/
	$(BIN)/python benchmarks/foundation.py

docs: $(READY)  ## build the site; any warning is an error
	$(SITE) docs/_build/site -b html
	@echo docs/_build/site/index.html

pictures: $(READY)  ## draw the pictures of docs/ anew
	$(BIN)/python docs/pictures.py

clean:  ## remove what make made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis docs/_build
