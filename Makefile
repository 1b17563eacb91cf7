# SPDX-License-Identifier: GPL-2.0-or-later
# `make venv` comes first everywhere: it installs what is missing and is quick when nothing is.

MAKEFLAGS += --no-print-directory
BIN := .venv/bin
TESTS ?= tests functional
# Test files are shared out among this many processes (functional/sharing.py); 0 runs all in one.
WORKERS ?= 4

.DEFAULT_GOAL := help
.PHONY: help venv demo lint check test lab bench run docs rpm clean

help: ## these lines
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: ## .venv, and the system packages that are missing
	@scripts/setup

demo: venv ## the agent at work on real storage, checked step by step (root)
	@PYTHONPATH=$(CURDIR) $(BIN)/python -P -m functional.demo

lint: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

check: venv ## the tests alone; TESTS=tests/images narrows, WORKERS=0 for one process
	@scripts/run-tests -n $(WORKERS) $(TESTS)

test: lint ## everything that continuous integration runs
	@scripts/run-tests -n $(WORKERS) $(TESTS)

lab: venv ## the tests that need device-mapper or several hosts, in guests (functional/lab)
	@scripts/run-tests -n $(WORKERS) functional/lab_tests $(wildcard functional/test_lab.py functional/test_cluster*.py)

bench: venv ## every promise that is measured; fails when one is not kept
	@failed=; for script in $$(grep -l __main__ benchmarks/*.py); do \
	    echo "== $$script"; $(BIN)/python -P $$script || failed="$$failed $$script"; \
	done; [ -z "$$failed" ] || { echo "not kept:$$failed"; exit 1; }

run: venv ## an instance of one's own, its state in ./.dev
	@$(BIN)/vdsm-storaged --dev .dev

docs: venv ## reference of all verbs, HTML and Markdown, in build/docs
	@$(BIN)/python -P -m vdsm_storage.verbs.tables \
	    | $(BIN)/python -P -m vdsm_storage.schema.docs build/docs --built -

rpm: venv ## build/rpm/*.rpm from the last commit
	@packaging/rpm/build build/rpm

clean: ## all but .venv
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
