# The fleet on one machine. `make` alone lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := .venv/bin
LOCKS  := deploy/local/requirements
EXTRAS := --extra agent --extra dev --extra local --extra report
OUT    ?= .

# Without bytecode, every process compiles the whole code again when it starts.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup run up stop kill status logs clean lint format test test-unit \
        dev test-integration test-e2e test-chaos k8s-test soak bench fuzz mutants protos lock sbom audit jars

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: ## install everything the fleet needs; safe to repeat
	@$(PYTHON) -m deploy.local.setup

dev: export FLEET_SERVE := $(if $(wildcard $(BIN)/ray),,none)
dev: lint ## run lint, types and quick unit tests; needs no JDK, Ray or vLLM
	$(BIN)/pytest -q -n auto -m "not slow" --hypothesis-profile dev tests/unit

run: up ## start everything, and take a story to DONE (OBSERVE=1: with Prometheus)
	@$(BIN)/python -m deploy.local.demo

up: setup ## start the servers and the workers
	@$(BIN)/python -m deploy.local up

stop: ## stop all processes gracefully; data is kept
	@$(BIN)/python -m deploy.local down

kill: ## kill all processes at once, like a power cut
	@$(BIN)/python -m deploy.local kill

status: ## show what runs, where, and whether it is healthy
	@$(BIN)/python -m deploy.local status

logs: ## follow all logs
	@$(BIN)/python -m deploy.local logs --follow

clean: ## remove the stack's data, logs and credentials (YES=1: without asking)
	@$(BIN)/python -m deploy.local clean $(if $(YES),--yes)

format: ## format the code
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lint: setup ## check style, types, import rules and wording
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.language

test: lint ## run every test against real servers
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -n 3 tests/unit tests/replay
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile tests/integration
	$(BIN)/pytest -n 2 --dist loadfile tests/chaos
	$(BIN)/pytest tests/e2e
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --skip-covered --fail-under=90

test-unit: setup ## run the unit tests
	$(BIN)/pytest tests/unit

test-integration: setup ## run the integration tests
	$(BIN)/pytest -n 2 --dist loadfile tests/integration

test-e2e: setup ## run the end-to-end tests, with Ray and vLLM
	$(BIN)/pytest tests/e2e

test-chaos: setup ## run the tests that kill processes and servers
	$(BIN)/pytest -n 2 --dist loadfile tests/chaos

k8s-test: setup ## apply the Kubernetes manifests to a real API server; needs Go, builds 5 minutes
	cd tests/k8s/apiserver && go build -buildvcs=false -o "$(CURDIR)/.fleet/k8s/apiserver" .
	$(BIN)/pytest tests/k8s

soak: setup ## run 30 stories while processes are killed (MINUTES=30 SEED=random)
	$(BIN)/python -m tests.chaos.load --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED))

bench: setup ## measure against plain asyncio and bare Temporal (PART="deliberation vllm"; PART=answers)
	$(BIN)/python -m tests.bench $(PARTS) $(PART)

fuzz: export SEED := $(or $(SEED),12)
fuzz: setup ## send 100,000 random messages to every edge, and try random examples (FUZZ=100000 CALLS=200 SEED=12)
	FUZZ=$(or $(FUZZ),100000) $(BIN)/pytest -n 2 tests/unit/test_fuzz.py
	$(BIN)/pytest -m hypothesis --hypothesis-profile random tests/unit tests/integration
	CALLS=$(or $(CALLS),200) $(BIN)/pytest tests/integration/bridge/test_grpc_fuzz.py

mutants: setup ## run mutation tests and list surviving mutants
	$(BIN)/mutmut run
	$(BIN)/mutmut results

protos: ## generate bridge/grpc/wire from bridge/grpc/protos
	@$(BIN)/python -m grpc_tools.protoc --proto_path=bridge/grpc/wire=bridge/grpc/protos \
	  --python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) \
	  $(patsubst bridge/grpc/protos/%,bridge/grpc/wire/%,$(wildcard bridge/grpc/protos/*.proto))

jars: ## pin the jars that neo4j/pom.xml names: copy them once, and write their hashes
	@rm -rf .fleet/jars
	@mvn -B -q --strict-checksums -f deploy/local/neo4j/pom.xml \
	  org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies \
	  -DoutputDirectory="$(CURDIR)/.fleet/jars" -DincludeScope=runtime
	@cd .fleet/jars && sha256sum *.jar > "$(CURDIR)/deploy/local/neo4j/jars.sha256"

audit: ## look for known vulnerabilities of the pinned packages; needs PyPI's database of them
	@$(PYTHON) -m deploy.local.setup --only uv
	@for kind in cpu gpu; do \
	  rm -f .fleet/audit.txt; \
	  .fleet/setup/uv/bin/uv tool run pip-audit==2.10.1 --strict --disable-pip --require-hashes \
	    --progress-spinner off --output .fleet/audit.txt --requirement $(LOCKS)/$$kind.lock && continue; \
	  if [ -s .fleet/audit.txt ]; then cat .fleet/audit.txt; else \
	    echo "$$kind.lock was not checked: the database of vulnerabilities did not answer as PyPI does" >&2; fi; \
	  exit 1; \
	done

sbom: ## write a CycloneDX bill of materials of each lock to .fleet/sbom
	@$(PYTHON) -m deploy.local.setup --only uv
	@mkdir -p .fleet/sbom
	@for kind in cpu gpu none fleet; do \
	  PYTHONWARNINGS=ignore .fleet/setup/uv/bin/uv tool run -q --from cyclonedx-bom==7.5.0 cyclonedx-py \
	    requirements $(LOCKS)/$$kind.lock \
	    --pyproject pyproject.toml --output-reproducible --of JSON --validate \
	    -o .fleet/sbom/$$kind.cdx.json && echo ".fleet/sbom/$$kind.cdx.json" || exit 1; \
	done

lock: ## pin the packages again (UPGRADE=1: to the newest that fit)
	@$(PYTHON) -m deploy.local.setup --only uv
	@for kind in cpu gpu; do \
	  .fleet/setup/uv/bin/uv pip compile pyproject.toml --extra serve-$$kind $(EXTRAS) \
	    --override $(LOCKS)/$$kind-overrides.txt --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url \
	    --no-header --no-annotate --quiet $(if $(UPGRADE),--upgrade) -o $(LOCKS)/$$kind.lock \
	    && echo "$(LOCKS)/$$kind.lock" || exit 1; \
	done
	@.fleet/setup/uv/bin/uv pip compile pyproject.toml $(EXTRAS) --constraint $(LOCKS)/cpu.lock \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --quiet -o $(LOCKS)/none.lock \
	  && echo "$(LOCKS)/none.lock"
	@.fleet/setup/uv/bin/uv pip compile pyproject.toml --constraint $(LOCKS)/none.lock \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --quiet -o $(LOCKS)/fleet.lock \
	  && echo "$(LOCKS)/fleet.lock"
	@$(MAKE) --no-print-directory sbom
