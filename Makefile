# Every target makes the virtual environment and installs by itself:
#   make quickstart   text → corpus → model → endpoint on this machine; the endpoint stays up until `make down`
#   make test         lint, types and the tests that are not marked slow, by two processes (WORKERS);   make test-all: the slow ones too
#   make bench        distlm beside its peers, one table each
# Override with e.g. `make test PYTHON=python3.12 VENV=.venv312`.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

export PATH := $(abspath $(BIN)):$(PATH)
export HF_HUB_OFFLINE = 1
export RAY_USAGE_STATS_ENABLED = 0
export TOKENIZERS_PARALLELISM = false
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export DS_ACCELERATOR = cpu
endif

.PHONY: quickstart down test test-all lint bench install clean
.DEFAULT_GOAL = test

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	@scripts/install.sh $(VENV) $(PYTHON)
	@touch $@

install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/distlm cluster up
	$(BIN)/distlm submit jobs/quickstart.yaml --follow

down: $(STAMP)
	$(BIN)/distlm cluster down

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

bench: $(STAMP)
	@for file in benchmarks/*.py benchmarks/corpus/*.py; do echo "$$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
