# The same few commands for everybody; .ci/run calls `make lint` and `make test`.
#
#   make run ONCE=1 MODEL=path/to/checkpoint STAGES=3 PROMPT="Once upon a time"
#   make images REGISTRY=registry.example.com/team TAG=1.0 VARIANT=cuda ENGINE=podman

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PACKAGES := $(VENV)/.packages
STAMP  := $(VENV)/.installed

MODEL   ?= demo
STAGES  ?= 2
PORT    ?= 8080
GRPC_PORT ?= 8081
PROMPT  ?= ROMEO: But soft! what light through yonder window breaks?
ONCE    ?=
TESTS   ?= tests
# twice the cores of a small machine: tests wait for processes much of the time
WORKERS ?= 4
BENCH   ?=
FUZZ    ?=
SOAK    ?=
STALL   ?=

REGISTRY ?=
TAG      ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
VARIANT  ?= cpu
ENGINE   ?= $(shell command -v docker >/dev/null && echo docker || echo podman)
BUILD_ARGS ?=
IMAGES   := $(if $(REGISTRY),$(REGISTRY:/=)/)stagecraft

export PROMPT
.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-install lint format bench fuzz soak stall images clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

run: $(STAMP) ## serve the demonstration model in 2 stages and send one prompt; ONCE=1 ends after the answer
	@$(BIN)/stagecraft up $(MODEL) --stages $(STAGES) --port $(PORT) --grpc-port $(GRPC_PORT) --prompt "$$PROMPT" $(if $(ONCE),--exit)

test: $(STAMP) ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(TESTS)

test-slow: $(STAMP) ## run those that take long: benchmarks at toy size, many kills
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(WORKERS) --timeout 1200 $(TESTS)

test-install: $(STAMP) ## run the install steps of the container images in fresh environments
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m install --timeout 1800 $(TESTS)

lint: $(STAMP) ## check style (ruff) and types (mypy --strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure, and print tables and JSON lines, the goals last; BENCH=--goals leaves out what no goal needs
	$(BIN)/python -m benchmarks $(BENCH)

fuzz: $(STAMP) ## give hostile inputs to every door; FUZZ="--inputs 1000000 --door stage-events --seed 1"
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.fuzz $(FUZZ)

soak: $(STAMP) ## inject faults while answers are generated, check each, print a table; SOAK="--seed 17 --generations 40"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(SOAK)

stall: $(STAMP) ## measure how long a stream stands still when a stage's replica is killed; STALL="--kills 40"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.stall $(STALL)

images: ## build the container images; REGISTRY=, TAG=, VARIANT=cpu|cuda, ENGINE=docker|podman
	@case '$(VARIANT)' in cpu | cuda) ;; *) echo "VARIANT must be cpu or cuda, got '$(VARIANT)'" >&2; exit 2 ;; esac
	@command -v '$(ENGINE)' >/dev/null || { \
	  echo "images are built by docker or podman, and there is no '$(ENGINE)' here: install one, or name it with ENGINE=" >&2; exit 1; }
	@$(ENGINE) info >/dev/null 2>&1 || { \
	  echo "'$(ENGINE) info' fails: is its daemon running, and may you use it? Run it to see the reason" >&2; exit 1; }
	$(ENGINE) build $(BUILD_ARGS) -f functions/Dockerfile --build-arg VARIANT=$(VARIANT) -t $(IMAGES)/stage:$(TAG)$(if $(filter cuda,$(VARIANT)),-cuda) .
	$(ENGINE) build $(BUILD_ARGS) -f orchestrator/Dockerfile --target results -t $(IMAGES)/results:$(TAG) .
	$(ENGINE) build $(BUILD_ARGS) -f orchestrator/Dockerfile -t $(IMAGES)/orchestrator:$(TAG) .

clean: ## remove everything that make has made, the environment too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# each is made again when what it depends on changes, else at once up to date
$(STAMP): $(PACKAGES) $(wildcard functions/*.c functions/*.h) tools/build_kernels.py
	$(BIN)/python tools/build_kernels.py
	@touch $@

$(PACKAGES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "Stagecraft needs Python 3.11; '$(PYTHON)' is not. Install it, or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,s3,gcs]'
	@touch $@
