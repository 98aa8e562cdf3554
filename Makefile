# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up.
#
# A machine without a GPU saves 3 GB with PyTorch's CPU build: set PIP_EXTRA_INDEX_URL to the CPU
# index that the install page of pytorch.org shows.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODELS ?= models
RUN ?= runs/demo

# glibc would map the temporaries of every step anew, a page fault for each 4 KiB of them; here it keeps
# them, and a training step on a CPU takes an eighth less.
KEEP := 17179869184
export GLIBC_TUNABLES ?= glibc.malloc.mmap_threshold=$(KEEP):glibc.malloc.trim_threshold=$(KEEP):glibc.malloc.arena_max=1

.PHONY: demo test test-slow parity bench models format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@

models: $(VENV)/.installed
	$(BIN)/python docs/demo/make_models.py --out $(MODELS)

# Trains on real speech, converts the result to PyTorch and compares the two.
demo: models
	$(BIN)/python train_tpu.py demo --out $(RUN) \
	    --encoder $(MODELS)/whisper-base --llm $(MODELS)/smollm2-135m-instruct
	$(BIN)/python -m convert to-torch $(RUN)/projector $(RUN)/pytorch --overwrite
	$(BIN)/python docs/demo/pytorch_check.py --run $(RUN) --projector $(RUN)/pytorch \
	    --manifest docs/demo/speech/heldout_unseen_voices.jsonl --out $(RUN)/parity.json
	$(BIN)/python docs/demo/report.py --run $(RUN) --parity $(RUN)/parity.json --out $(RUN)/report

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 --jaxtyping-packages=flax_projector,beartype.beartype

# Real weights, and the compilers of TPUs and GPUs, which need neither: minutes, not seconds. The one
# for GPUs lies apart, since JAX would look for a GPU wherever it finds it.
test-slow: models
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[slow]'
	test -d .gpu-compiler || $(BIN)/python -m pip install --quiet --constraint constraints.txt \
	    --no-deps --target .gpu-compiler jax-cuda12-plugin jax-cuda12-pjrt nvidia-cudnn-cu12
	PYTHONPATH=.gpu-compiler FLAX_PROJECTOR_MODELS=$(abspath $(MODELS)) \
	    $(BIN)/python -m pytest -m slow

# Measured errors against PyTorch and transformers, from the tests that compare.
parity: models
	FLAX_PROJECTOR_MODELS=$(abspath $(MODELS)) $(BIN)/python -m pytest \
	    -m 'parity or consistency' --parity-table=docs/parity.md

# Side by side with PyTorch and with the plain libraries; prints JSON.
bench: models
	$(BIN)/python benchmarks/bench_projector.py
	$(BIN)/python benchmarks/bench_towers.py
	$(BIN)/python benchmarks/bench_train_step.py
	$(BIN)/python benchmarks/bench_job.py
	$(BIN)/python benchmarks/bench_input.py
	$(BIN)/python benchmarks/bench_convert.py
	$(BIN)/python benchmarks/bench_load.py --models $(MODELS)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .gpu-compiler runs .pytest_cache .ruff_cache
