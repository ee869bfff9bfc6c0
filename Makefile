# On a machine with Python 3.10+ and git: `make demo` makes a picture, `make test` runs the tests.
# Each sets up .venv first; once that is done it starts at once.

PYTHON ?= python3
VENV := .venv
LOWEST_VENV := .venv-lowest
BIN := $(VENV)/bin
OUTPUT_DIR ?= outputs
DATASET_DIR ?= data/emoji
SOURCES := src scripts examples tests packages setup.py
TEXTS := docs README.md CHANGELOG.md CONTRIBUTING.md

# PROMPT reaches the script through the environment: quotes, dollar signs and other shell characters stay as they are typed.
# Only `make demo PROMPT=...` sets it; a PROMPT that the login shell exports is its command prompt.
ifeq ($(origin PROMPT),command line)
override PROMPT := $(value PROMPT)
export PROMPT
else
unexport PROMPT
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := setup
.PHONY: help setup venv demo test test-lowest style quality docs dataset dist clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
		| awk -F'|' '{ printf "  make %-11s  %s\n", $$1, $$2 }'
	@echo
	@echo '  make demo PROMPT="a red apple"      your own prompt (in single quotes if it has a dollar sign)'
	@echo '  make test PYTEST_ARGS="-k scheduler"  part of the tests'
	@echo '  make setup PYTHON=python3.12        another interpreter for .venv'

setup: $(VENV)/.installed ## set up .venv: the package, editable, and what its tests need

venv: setup

demo: $(VENV)/.installed ## write outputs/demo.png with the cascade that ships with the package
	$(BIN)/python scripts/demo.py --output_dir "$(OUTPUT_DIR)" $${PROMPT:+"--prompt=$$PROMPT"}

test: $(VENV)/.installed ## run the test suite
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

test-lowest: $(LOWEST_VENV)/.installed ## run the test suite on the lower bounds of setup.cfg, in .venv-lowest
	$(LOWEST_VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

style: $(VENV)/.quality ## format the code, fix what ruff can fix
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.quality ## check style, format, types, spelling and English, change nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/codespell $(SOURCES) $(TEXTS)
	$(BIN)/python scripts/check_prose.py

docs: $(VENV)/.docs ## write docs/structure.md and docs/training_flags.md, and build the documentation into site/
	$(BIN)/python scripts/write_structure.py
	$(BIN)/python scripts/write_training_flags.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "The documentation is in site/index.html"

dataset: $(VENV)/.installed ## build the captioned emoji set in data/emoji (needs npm)
	$(BIN)/python scripts/build_emoji_dataset.py --output_dir "$(DATASET_DIR)"

dist: $(VENV)/.dist ## build the wheels and the source distribution in dist/, and check them
	rm -rf dist build packages/emoji/build
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m build --no-isolation --wheel --outdir dist packages/emoji
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py dist

clean: ## remove .venv, .venv-lowest, outputs, build products and caches
	rm -rf $(VENV) $(LOWEST_VENV) outputs build dist site src/*.egg-info packages/emoji/build packages/emoji/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: CONSTRAINTS := constraints.txt
$(VENV)/.installed: constraints.txt
$(LOWEST_VENV)/.installed: CONSTRAINTS := constraints-lowest.txt
$(LOWEST_VENV)/.installed: constraints-lowest.txt
$(VENV)/.installed $(LOWEST_VENV)/.installed: setup.cfg pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "$(PYTHON) was not found: install Python 3.10 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), and Python 3.10 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(@D) || { \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(@D)/bin/python -m pip install --no-compile -c $(CONSTRAINTS) -e ".[test]"
	@# on all cores, where pip compiles on one; some packages have files that are not Python of this version
	@$(@D)/bin/python -m compileall -qq -j 0 $(@D)/lib || true
	@touch $@

$(VENV)/.docs: $(VENV)/.installed mkdocs.yml
	$(BIN)/python -m pip install -c constraints.txt -e ".[docs]"
	@touch $@

$(VENV)/.quality: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e ".[quality]"
	@touch $@

$(VENV)/.dist: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e ".[dist]"
	@touch $@
