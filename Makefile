# Everything here works on a bare machine with Python 3.11 or newer, its venv module, make and gcc:
# the virtual environment is made once and reused until pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# What looks after the supply chain, apart from what the tests run with.
TOOLS := .venv-tools
LOCKS := api worker build
lock_api := pyproject.toml
lock_worker := --extra worker --extra cpu pyproject.toml
lock_build := requirements/build.in

# What the demo shows unless told: a real clip where the development data is at hand, else a scene that it renders.
IMCNET_TEST_DATA ?= ../shared/data
CLIP := $(foreach clip,$(wildcard $(IMCNET_TEST_DATA)/davis16/val/car-roundabout.mp4),"$(clip)" --truth "$(clip:.mp4=.masks.zip)")

.DEFAULT_GOAL := help
JOBS ?= 1000
SEED ?= 1

.PHONY: help demo up train test chaos soak lint format lock audit sbom clean build/tested.txt

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(INSTALLED) ## send a video (VIDEO=path) through the whole service; results in demo/
	$(BIN)/imcnet demo $(if $(VIDEO),"$(VIDEO)",$(CLIP)) --out demo

up: $(INSTALLED) ## run API, worker and a private Redis in this terminal (WEIGHTS=path, or IMCNET_WEIGHTS)
	$(BIN)/imcnet up $(if $(WEIGHTS),--weights "$(WEIGHTS)")

train: $(INSTALLED) ## train the default weights, or resume a training (DATA=folder OUT=runs/shipped)
	$(BIN)/imcnet train --recipe shipped --data "$(or $(DATA),$(IMCNET_TEST_DATA))" --out "$(or $(OUT),runs/shipped)"

test: $(INSTALLED) ## run all tests
	$(BIN)/python -m pytest

chaos: $(INSTALLED) ## inject every fault of the catalogue into a running service (SEED=1)
	$(BIN)/python -m pytest tests/chaos -m chaos --chaos full --chaos-seed $(SEED)

soak: $(INSTALLED) ## many short jobs while everything is killed at random (JOBS=1000 SEED=1)
	$(BIN)/python -m tests.chaos.soak --jobs $(JOBS) --seed $(SEED)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## format the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Forgets what is locked for what the tests run with, so that no image holds versions that were never tried.
UPGRADED := $(if $(UPGRADE),--upgrade --constraint build/tested.txt)

lock: $(TOOLS)/.installed $(if $(UPGRADE),build/tested.txt) ## lock what the images install (UPGRADE=1: anew, as the tests run with it)
	$(foreach name,$(LOCKS),$(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 \
		--fork-strategy fewest --generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock" \
		$(UPGRADED) $(lock_$(name)) --output-file requirements/$(name).txt &&) true

build/tested.txt: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable >$@

# Without the conditions behind a `;`: pip-audit leaves out, without a word, what this very machine would not install.
audit: $(TOOLS)/.installed ## look for known vulnerabilities in what is locked; needs the internet
	mkdir -p build
	sed 's/ ; .*\\$$/ \\/' $(LOCKS:%=requirements/%.txt) >build/audited.txt
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --requirement build/audited.txt

sbom: $(TOOLS)/.installed ## list what each image installs, as CycloneDX JSON in dist/
	mkdir -p dist
	$(foreach name,api worker,$(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file dist/sbom-$(name).cdx.json requirements/$(name).txt &&) true

clean: ## remove caches, builds and the demo's results, not the virtual environments
	rm -rf build dist demo *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .schemathesis
	find . \( -path ./$(VENV) -o -path ./$(TOOLS) \) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9' 'pip-audit>=2.9' 'cyclonedx-bom>=7'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)" >&2; \
		echo "Say which one to take: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) lacks its venv module: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
