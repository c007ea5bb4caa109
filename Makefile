# The whole developer interface. Every target creates the virtual environment on first use and reuses it
# while pyproject.toml and constraints.txt are unchanged. `make help` lists the targets.
VENV   ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
ONCE   ?=
ARGS   ?=
FUZZ_S ?= 30

BIN    := $(VENV)/bin
# The stamp names what was installed and for which checkout: a changed pin, or a virtual environment shared
# with another checkout, is noticed.
STAMP_TEXT := $(shell cat pyproject.toml constraints.txt 2>/dev/null | sha256sum | cut -c1-16) $(CURDIR)

.PHONY: help venv demo test lint types layers proto proto-check pytest bench gpu-check soak chaos fuzz format

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## create or update the virtual environment (VENV=.venv)
	@[ "$$(cat $(VENV)/.wattline 2>/dev/null)" = "$(STAMP_TEXT)" ] || { \
	  echo "installing into $(VENV) (a few minutes the first time)"; \
	  [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]' \
	  && echo "$(STAMP_TEXT)" > $(VENV)/.wattline; }

demo: venv ## serve the two demonstration models and ask them something (ONCE=1: then stop)
	@$(BIN)/wattline demo $(if $(ONCE),--once) $(ARGS)

test: venv ## everything that must hold: lint, types, layers, generated code, all CPU tests
	@$(MAKE) --no-print-directory lint types layers proto-check pytest

lint: venv ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .

format: venv ## rewrite the code in the house format
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .

types: venv ## mypy --strict
	@$(BIN)/mypy

layers: venv ## imports go down the house only
	@$(BIN)/lint-imports

proto: venv ## regenerate the protobuf code
	@$(BIN)/python -m protos.generate

proto-check: venv ## fail if the committed protobuf code is stale
	@$(BIN)/python -m protos.generate --check

pytest: venv ## the CPU tests (ARGS="-k name" to choose)
	@$(BIN)/python -m pytest -m "not soak and not (chaos and slow)" --durations=15 $(ARGS)

soak: venv ## mixed load on the demonstration models, 10,000 simulated bad afternoons of a router, 100,000 ledgers
	@$(BIN)/python -m pytest -m soak $(ARGS)

chaos: venv ## the fault matrix of docs/reliability.md: kill, stop, cut, fill, all of it
	@$(BIN)/python -m pytest -m chaos --durations=15 $(ARGS)

fuzz: venv ## search the parsers for inputs that raise our bugs, 30 s each (FUZZ_S=300; ARGS="config keys")
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[fuzz]'
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_S) $(ARGS)

bench: venv ## measure engine, line and edge on this machine; results go to bench/results/
	@$(BIN)/python -m bench $(ARGS)

gpu-check: ## check and measure this machine's NVIDIA GPU, eight minutes (ARGS="--quick"); installs nothing
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu_check $(ARGS)
