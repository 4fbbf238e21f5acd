# The fleet on one machine. `make` alone says what there is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := .venv/bin
LOCKS  := deploy/local/requirements

.DEFAULT_GOAL := help
.PHONY: help setup run up stop kill status logs clean lint format test test-unit \
        dev test-integration test-e2e test-chaos soak bench mutants lock

help: ## what can be made
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: ## everything the fleet needs, installed once; safe to repeat
	@$(PYTHON) -m deploy.local.setup

dev: export FLEET_SERVE := $(if $(wildcard $(BIN)/ray),,none)
dev: lint ## lint, types and unit tests; needs no JDK, Ray or vLLM
	$(BIN)/pytest -q tests/unit tests/replay

run: up ## the servers, the workers, and a story taken to DONE
	@$(BIN)/python -m deploy.local.demo

up: setup ## the servers and the workers
	@$(BIN)/python -m deploy.local up

stop: ## end them in good order; what they stored stays
	@$(BIN)/python -m deploy.local down

kill: ## end them at once, as a power cut would
	@$(BIN)/python -m deploy.local kill

status: ## what runs, where, and whether it is healthy
	@$(BIN)/python -m deploy.local status

logs: ## follow the logs of all parts
	@$(BIN)/python -m deploy.local logs --follow

clean: ## remove what the stack stored, its logs and credentials (YES=1: without asking)
	@$(BIN)/python -m deploy.local clean $(if $(YES),--yes)

format: ## put the code in shape
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lint: setup ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint ## everything, against real servers: the test command
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --skip-covered --fail-under=90

test-unit: setup
	$(BIN)/pytest tests/unit

test-integration: setup
	$(BIN)/pytest tests/integration

test-e2e: setup
	$(BIN)/pytest tests/e2e

test-chaos: setup
	$(BIN)/pytest tests/chaos

soak: setup ## 30 stories in flight while processes are killed (MINUTES=30 SEED=random)
	$(BIN)/python -m tests.chaos.load --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED))

bench: setup ## where the time goes, side by side with what one would use instead (PARTS=all)
	$(BIN)/python -m tests.bench $(PARTS)

mutants: setup ## break the pure rules line by line; which breaks no test notices
	$(BIN)/mutmut run
	$(BIN)/mutmut results

lock: ## pin the packages again (UPGRADE=1: to the newest that fit)
	@$(PYTHON) -m deploy.local.setup --only uv
	@for kind in cpu gpu; do \
	  .fleet/setup/uv/bin/uv pip compile pyproject.toml --extra serve-$$kind --extra dev \
	    --override $(LOCKS)/$$kind-overrides.txt --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url \
	    --no-header --no-annotate --quiet $(if $(UPGRADE),--upgrade) -o $(LOCKS)/$$kind.lock \
	    && echo "$(LOCKS)/$$kind.lock" || exit 1; \
	done
	@.fleet/setup/uv/bin/uv pip compile pyproject.toml --extra dev --constraint $(LOCKS)/cpu.lock \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --quiet -o $(LOCKS)/none.lock \
	  && echo "$(LOCKS)/none.lock"
