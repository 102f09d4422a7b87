# Every target makes what it needs from nothing but a python3 >= 3.11 on PATH.

PYTHON ?= python3
EXTRAS ?= demo,dev,export,test

VENV := .venv
BIN := $(VENV)/bin
SOURCES := ir frontends backends runtime src
# In build/, which also holds the links of the editable install: who removes it gets a new install.
INSTALLED := build/.installed

.PHONY: demo test lint bench fuzz layers clean FORCE
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py

test: $(INSTALLED)
	$(BIN)/pytest -n 2
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/pytest -m mesh

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/pytest --benchmark-only benchmarks

fuzz: $(INSTALLED)
	$(BIN)/python tests/support/fuzzing.py

# The page about layers, from the tables of which layer is which.
layers: $(INSTALLED)
	$(BIN)/python -m linsey._layers.page docs/layers.md

clean:
	rm -rf $(VENV) build dist *.egg-info
	rm -rf .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The editable install links single files, so a file that is new or gone needs a new install; an
# edit does not. build/ goes first, because setuptools takes up whatever is left in it.
$(INSTALLED): pyproject.toml setup.cfg $(VENV)/inputs
	rm -rf build
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

# The extras and the names of the source files; rewritten only when one of them changes.
$(VENV)/inputs: FORCE | $(BIN)/python
	@{ echo '$(EXTRAS)'; find $(SOURCES) -name __pycache__ -prune -o -type f -print | LC_ALL=C sort; } > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "linsey needs Python >= 3.11, and $(PYTHON) is " + sys.version.split()[0] + ": name another one with make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
