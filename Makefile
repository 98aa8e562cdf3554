# Two commands for a fresh machine: `make demo` and `make test`. Each sets up what it needs.
#
# On a machine without a GPU, PyTorch's CPU build saves a download of 3 GB: set PIP_EXTRA_INDEX_URL
# to the CPU index that the install page of pytorch.org shows.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
MODELS ?= models
RUN ?= runs/demo

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install $(CONSTRAINTS:%=--constraint %)

# Without this, glibc returns the memory of a step's temporaries to the system and gets it back page
# by page in the next step. Keeping it saves an eighth of the time of a training step on a CPU.
KEEP := 17179869184
export GLIBC_TUNABLES ?= glibc.malloc.mmap_threshold=$(KEEP):glibc.malloc.trim_threshold=$(KEEP):glibc.malloc.arena_max=1

.PHONY: demo test test-slow test-wheel lint parity bench models format clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[demo,test]'
	touch $@

models: $(VENV)/.installed
	$(BIN)/python examples/demo/make_models.py --out $(MODELS)

# Trains on real speech, converts the result to PyTorch and compares the two.
demo: models
	$(BIN)/python train_tpu.py demo --out $(RUN) \
	    --encoder $(MODELS)/whisper-base --llm $(MODELS)/smollm2-135m-instruct
	$(BIN)/python -m convert to-torch $(RUN)/projector $(RUN)/pytorch --overwrite --hf-folder \
	    --audio-model-id openai/whisper-base \
	    --text-model-id HuggingFaceTB/SmolLM2-135M-Instruct
	$(BIN)/python examples/demo/pytorch_check.py --run $(RUN) --projector $(RUN)/pytorch \
	    --manifest examples/demo/speech/heldout_unseen_voices.jsonl --out $(RUN)/parity.json
	$(BIN)/python examples/demo/results.py --run $(RUN) --parity $(RUN)/parity.json

# The GPU's compiler, which plans need. It is in no extra but in a folder of its own, because JAX looks
# for a GPU wherever it finds one. Attention in bfloat16 needs cuDNN, which is four times as large.
GPU_COMPILER := .gpu-compiler
INTO_GPU_COMPILER = $(INSTALL) --no-deps --upgrade --target $(GPU_COMPILER)

$(GPU_COMPILER)/jax_plugins: $(VENV)/.installed
	$(INTO_GPU_COMPILER) jax-cuda12-plugin jax-cuda12-pjrt
	touch $@

$(GPU_COMPILER)/nvidia: $(GPU_COMPILER)/jax_plugins
	$(INTO_GPU_COMPILER) nvidia-cudnn-cu12
	touch $@

# Most of the time goes into compiling small programs that run once: these need no optimised code.
# `make parity` and `make test-slow` compile as users do.
test: lint $(GPU_COMPILER)/jax_plugins
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0" $(BIN)/python -m pytest \
	    -n 2 --dist loadgroup --jaxtyping-packages=flax_projector,beartype.beartype

# The checks of the code itself; pre-commit runs them too.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Real weights, the installed wheel, and the TPU and GPU compilers, which need no such device: takes
# minutes instead of seconds.
test-slow: models $(GPU_COMPILER)/nvidia
	PYTHONPATH=$(GPU_COMPILER) FLAX_PROJECTOR_MODELS=$(abspath $(MODELS)) \
	    $(BIN)/python -m pytest -m slow

# The wheel alone, installed outside the checkout; part of test-slow.
test-wheel: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

# Measured errors against PyTorch and transformers, from the tests that compare with them.
parity: models
	FLAX_PROJECTOR_MODELS=$(abspath $(MODELS)) $(BIN)/python -m pytest \
	    -m 'parity or consistency' --parity-table=docs/parity.md

# Side by side with PyTorch and with the plain libraries; prints JSON.
bench: models
	$(BIN)/python benchmarks/bench_projector.py
	$(BIN)/python benchmarks/bench_towers.py
	$(BIN)/python benchmarks/bench_train_step.py
	$(BIN)/python benchmarks/bench_decode.py --models $(MODELS)
	$(BIN)/python benchmarks/bench_job.py
	$(BIN)/python benchmarks/bench_input.py
	$(BIN)/python benchmarks/bench_convert.py
	$(BIN)/python benchmarks/bench_load.py --models $(MODELS)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The lower bounds of pyproject.toml as constraints:
# `make test CONSTRAINTS=floors.txt VENV=.venv-floors` runs the tests with them.
floors.txt: pyproject.toml constraints.txt .github/floors.py
	$(PYTHON) .github/floors.py > $@

clean:
	rm -rf $(VENV) $(GPU_COMPILER) build dist floors.txt runs .pytest_cache .ruff_cache
