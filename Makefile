# `make train` and `make test` work on a fresh clone with nothing but Python >= 3.11; each makes what it needs first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq -c constraints.txt
# Two test processes, one thread each: torch's own threads would fight over the cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -n $(WORKERS) --dist loadscope

TRAIN_CONFIG ?= electra_tiny
TRAIN_OUTPUT ?= runs/$(TRAIN_CONFIG)
ACCELERATE_CONFIG ?= examples/accelerate/cpu.yaml
TRAIN_SCRIPT ?= examples/pretrain.py
DEMO_SCRIPT ?= examples/demo.py

.PHONY: train test test-slow bench quality style index clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

train: $(VENV)/.installed-examples
	$(VENV)/bin/accelerate launch --config_file $(ACCELERATE_CONFIG) $(TRAIN_SCRIPT) --config $(TRAIN_CONFIG) --output_dir $(TRAIN_OUTPUT)
	$(RUN) $(DEMO_SCRIPT) $(TRAIN_OUTPUT)

test: $(VENV)/.installed-test-quality
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.installed-test-quality
	$(PYTEST) -m "slow or gpu"

bench: $(VENV)/.installed-test-quality
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.run

quality: $(VENV)/.installed-test-quality
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) .ci/lint_models.py

style: $(VENV)/.installed-test-quality
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) -m bestiary.index README.md

index: $(VENV)/.installed-test-quality
	$(RUN) -m bestiary.index README.md

# Leaves the environment, the demo data and what was trained.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

# One stamp per set of extras ("test-quality" -> [test,quality]), written only after an install that succeeded. An environment that is
# there already is used as it is. torch goes first and alone: of the builds at hand pip takes the one that the constraint names.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(RUN) -m pip --version >/dev/null 2>&1 || { $(PYTHON) -c $(CHECK_PYTHON) && $(PYTHON) -m venv $(VENV); }
	@echo "Installing bestiary[$(subst -,$(comma),$*)] into $(VENV); the first time this takes some minutes."
	@$(PIP) torch
	@$(PIP) -e '.[$(subst -,$(comma),$*)]'
	@touch $@

comma := ,
CHECK_PYTHON := 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
