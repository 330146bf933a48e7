# Everything a developer runs. `make help` lists it. Needs Python 3.10 or newer, and PyPI once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODULES := $(VENV)/.modules
TREE := build/tree
NATIVE := build/native
CLIENTS := .venv-clients
CMAKE := $(or $(shell command -v cmake),$(BIN)/cmake)

.DEFAULT_GOAL := help
.PHONY: help install fit test test-clients lint format types contract native docs check clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## .venv with the tested versions and this tree, editable

fit: $(INSTALLED)  ## calibrate, fold and export the built-in model
	$(BIN)/python train.py fit --config w4a4.yaml

# A process for each core: tensors are tiny here, threads would only wait for each other.
test: $(INSTALLED)  ## all tests; ARGS="-m 'not slow'" leaves the slow ones out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-clients: $(INSTALLED) $(CLIENTS)/.installed  ## exports, loaded by the programs they are meant for
	OMNIQUANT_CLIENTS=$(abspath $(CLIENTS)/bin/python) $(BIN)/python -m pytest -m clients $(ARGS)

lint: $(INSTALLED)  ## ruff, codespell, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*)

format: $(INSTALLED)  ## rewrite Python and C++ in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*/*)

# Types and layers are checked on the tree as it is installed, where callbacks/ is a subpackage.
types: $(TREE)  ## mypy --strict
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	    --cache-dir ../../.mypy_cache -p omniquant_pl
	cd $(TREE) && MYPYPATH=../../benchmarks ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	    --cache-dir ../../.mypy_cache ../../benchmarks/*.py ../../scripts/*.py

# -S: without the site module the editable installation does not stand before the tree.
contract: $(TREE)  ## imports go down the floors only
	PYTHONPATH=$(TREE):$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	    $(BIN)/python -S -c 'from importlinter.cli import lint_imports_command as run; run()' \
	    --config pyproject.toml --no-cache

native: $(CMAKE)  ## C++ and, where nvcc is found, CUDA, with warnings as errors
	$(CMAKE) -S . -B $(NATIVE) -DOMNIQUANT_WERROR=ON
	$(CMAKE) --build $(NATIVE) --parallel

docs: $(TREE) $(BIN)/mkdocs  ## the pages of docs/ into build/docs, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

check: test lint types contract native docs  ## all of the above, as CI does

clean:  ## remove builds and caches; the environment stays
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/mkdocs: | $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'

$(BIN)/cmake: | $(BIN)/python
	$(BIN)/python -m pip install -q cmake

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*/*) $(MODULES)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# Programs that load exports pin versions of their own and are kept apart; llama-cpp-python is compiled.
$(CLIENTS)/.installed: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q -r $<
	@touch $@

# An editable installation remembers where each module stood: it is renewed when one moves.
$(MODULES): FORCE | $(BIN)/python
	@find omniquant_pl callbacks -name '*.py' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(TREE): FORCE $(INSTALLED)
	@rm -rf $@
	$(BIN)/python -m pip install -q --no-deps --target $@ --config-settings=wheel.cmake=false .
