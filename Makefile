# The same few commands for everybody; .ci/run calls `make lint` and `make test`.
#
#   make run ONCE=1 MODEL=path/to/checkpoint STAGES=3 PROMPT="Once upon a time"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

MODEL   ?= demo
STAGES  ?= 2
PORT    ?= 8080
GRPC_PORT ?= 8081
PROMPT  ?= ROMEO: But soft! what light through yonder window breaks?
ONCE    ?=
TESTS   ?= tests
WORKERS ?= 2

export PROMPT
.DEFAULT_GOAL := help
.PHONY: help run test lint format bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

run: $(STAMP) ## serve the demonstration model in 2 stages and send one prompt; ONCE=1 ends after the answer
	@$(BIN)/stagecraft up $(MODEL) --stages $(STAGES) --port $(PORT) --grpc-port $(GRPC_PORT) --prompt "$$PROMPT" $(if $(ONCE),--exit)

test: $(STAMP) ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(TESTS)

lint: $(STAMP) ## check style (ruff) and types (mypy --strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure, and print a table and a JSON line for each benchmark
	$(BIN)/python -m benchmarks

clean: ## remove everything that make has made, the environment too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# made again when the requirements change, else at once up to date
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "Stagecraft needs Python 3.11; '$(PYTHON)' is not. Install it, or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
