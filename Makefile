# `make install` installs, `make run` trains the quickstart, `make test` runs the tests.
# PYTHON=/path/to/python3.11 chooses another interpreter for .venv.

.DEFAULT_GOAL := help
.PHONY: help install run test test-all test-nemo lint format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## Install what training needs into .venv, and nothing else
	@scripts/bootstrap run

run:  ## Fine-tune a real 135M model on this machine (about five minutes on two cores)
	@scripts/bootstrap run
	@scripts/quickstart

test:  ## Install what the tests need, then run them: unit, parity, slurm (a quarter of an hour on two cores)
	@scripts/bootstrap dev
	@scripts/install-slurm
	@scripts/test

test-all:  ## The same with those marked slow: full grids, every fault once more (an hour)
	@scripts/bootstrap dev
	@scripts/install-slurm
	@scripts/test --all

test-nemo:  ## Compare with the real NeMo 2.7.3, in an environment of its own (2.5 GB)
	@scripts/bootstrap dev
	@scripts/bootstrap-nemo
	@scripts/test -m nemo

lint:  ## Check style, types, spelling and shell scripts
	@scripts/bootstrap dev
	@scripts/check

format:  ## Rewrite the sources as `make lint` wants them
	@scripts/bootstrap dev
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

clean:  ## Remove .venv, build outputs and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find launcher sft tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
