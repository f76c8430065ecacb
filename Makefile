# make env    the environment in .venv, from requirements.lock; does nothing when it is there
# make demo   real cells -> token store -> a short pretraining -> summary and loss plot
# make test   every test
# make quick  the unit tests of what differs from the branch main, and the rules of the house
# make soak   many repetitions of the rare faults, in about two hours (ONLY="kills slurm" for some)
# make lint   style, types, directions of imports, shell scripts
# make image  the image for GPU nodes, by docker (DOCKER=podman); BASE=... pins another base
# make clean  removes all that these made; your own runs stay
#
# PYTHON=python3.12  another interpreter         PIP_ARGS="..."  further arguments for every pip
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: env demo test quick soak lint image clean

PYTHON ?= python3
PIP_ARGS ?=
DOCKER ?= docker
BASE ?=
IMAGE ?= geneformer_mcore
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Named by what they were made from, and where: scripts in an environment hold its absolute path.
# base_prefix is the same inside an environment: one that is activated does not ask for another.
INTERPRETER := import os, sys; print(sys.version, os.path.realpath(sys.base_prefix))
EMPTY := .venv/empty-$(shell (pwd; $(PYTHON) -c '$(INTERPRETER)') 2>&1 | sha256sum | cut -c1-16)
INSTALLED := .venv/installed-$(shell \
    (cat requirements.lock setup.py; echo $(EMPTY)) | sha256sum | cut -c1-16)

CELLS := build/demo/pbmc68k.h5ad
STORE := build/demo/store
# The code by which cells and store are made: they are made anew when it changes.
CELLS_CODE := data_prep/demo_cells.py $(addprefix geneformer_mcore/tokenizer/,gencode.csv.gz gencode.py genes.py)
STORE_CODE := $(wildcard data_prep/*.py $(addprefix geneformer_mcore/,$(addsuffix /*.py,io tokenizer store store/ingest store/split)))

env: $(INSTALLED)

$(EMPTY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	touch $@

$(INSTALLED): | $(EMPTY)
	@echo 'Setting up .venv (once)'
	@# torch comes first and alone, so that nothing that depends on it chooses its build.
	$(PIP) install --quiet $(PIP_ARGS) --constraint requirements.lock torch
	$(PIP) install --quiet $(PIP_ARGS) --requirement requirements.lock
	$(PIP) install --quiet $(PIP_ARGS) --no-deps --no-build-isolation --editable .
	rm -f .venv/installed-*
	touch $@

# OMP_NUM_THREADS only keeps torchrun from remarking on it: the ranks share the cores by themselves.
# torchrun turns every exit code into 1: the report ends with the code that the run wrote down.
# `mkdir` without -p, and the process in the name: no two demos ever share a folder.
demo: env $(STORE)/manifest.json
	@export OMP_NUM_THREADS=1; run=runs/demo_$$(date +%Y%m%d_%H%M%S)_$$$$; status=0; \
	mkdir -p runs; mkdir $$run; \
	$(BIN)/torchrun --nproc_per_node=2 --rdzv-backend=loopback --max-restarts=0 \
	    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=120 \
	    launch/pretrain.py --config configs/demo.yaml run.dir=$$run || status=$$?; \
	$(BIN)/python launch/report.py $$run || exit $$?; \
	exit $$status

$(STORE)/manifest.json: $(CELLS) $(STORE_CODE) | $(INSTALLED)
	$(BIN)/python data_prep/build_store.py --out $(STORE) --overwrite \
	    --validation-fraction 0.1 --test-fraction 0.05 $(CELLS)

$(CELLS): $(CELLS_CODE) | $(INSTALLED)
	$(BIN)/python data_prep/demo_cells.py --out $@

# Files of tests are shared out among two processes in their order, those of several ranks first: what
# waits and what computes overlap, and the many short ones come last.
test: env
	$(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

quick: env
	$(BIN)/python tests/quick.py

soak: env
	$(BIN)/python -m tests.soak $(if $(ONLY),--only $(ONLY))

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	@command -v shellcheck >/dev/null || { echo 'shellcheck is not installed: left out'; exit; }; \
	shellcheck --external-sources .ci/run tests/*.sh slurm/*.sh

# docker keeps the default of the Dockerfile where BASE is not given.
image:
	$(DOCKER) build $(if $(BASE),--build-arg BASE=$(BASE)) \
	    --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) \
	    --tag $(IMAGE) .

clean:
	rm -rf .venv build runs/demo_* *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
