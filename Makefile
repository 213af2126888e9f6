# Every target brings what it needs; none needs a step before it. `make help` lists them.
BIN := .venv/bin
READY := .venv/.ready
SETUP_INPUTS := pyproject.toml packages.txt scripts/setup.sh $(shell find src -name '_*.[ch]')

# make test FAST=1 leaves real engines out; NIGHTLY=1 adds the long ones; ARGS go to pytest.
NOT_FAST := $(if $(FAST),not engine,)
NOT_LONG := $(if $(NIGHTLY),,not nightly)
# One order for every change, so that each is judged alike; a nightly run draws another.
ORDER := $(if $(NIGHTLY),,--randomly-seed=1)
SELECTED := $(if $(and $(NOT_FAST),$(NOT_LONG)),$(NOT_FAST) and $(NOT_LONG),$(NOT_FAST)$(NOT_LONG))

# Engines start twice as fast from bytecode, and it goes into this folder's .venv.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test check bench soak format clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: $(READY)  ## a real vLLM and model: store, reset, load, a second engine, a killed daemon
	$(BIN)/python -m kvkeep demo $(ARGS)

test: $(READY)  ## all tests, quick ones first (FAST=1: no engines; NIGHTLY=1: long ones too)
	$(BIN)/python -m pytest $(if $(SELECTED),-m "$(SELECTED)") $(ORDER) $(ARGS)

check: $(READY)  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## one JSON line per figure (ONLY=name: one benchmark)
	$(BIN)/python -m benchmarks.run $(ONLY) $(ARGS)

soak: $(READY)  ## half an hour of mixed load: nothing grows, is wrong or lost (MINUTES=3: less)
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),30) $(ARGS)

format: $(READY)  ## put the code into the form that check asks for
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:  ## remove all that make put into this folder (a converted model stays in the user's cache)
	rm -rf .venv .venv-* .cache build results uv.lock .mypy_cache .ruff_cache .pytest_cache
	rm -rf .hypothesis .import_linter_cache src/*.egg-info
	find src -name '_*.so' -delete
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(SETUP_INPUTS)
	@scripts/setup.sh
	@touch $@
