# Two commands for a fresh machine: `make study` and `make test`. Both build .venv and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Versions tested together; a plain `torch` would bring whatever is newest.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install study test test-slow check format fuzz sanitize bench plots gpu cuda-resources clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt csrc/*.h csrc/cpu/*
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

study: $(STAMP)
	$(BIN)/optical study $(CONFIG)

# Tests make every model and text they need.
test test-slow: export HF_HUB_OFFLINE := 1
test test-slow: export TOKENIZERS_PARALLELISM := false
# Their problems are tiny: a second thread costs more than it brings.
test test-slow: export OMP_NUM_THREADS := 1

# The interpreter of Triton has a process of its own: it is chosen when kernels are imported.
test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "not slow" tests/triton_interpreter

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m slow tests/triton_interpreter

# Random calls, valid ones against the float64 reference, as many as the time allows.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --calls 100000 --seconds $(or $(SECONDS),300)

# The same against a library that watches its memory and its arithmetic, and one that watches threads.
sanitize: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/sanitize.py --calls 2000 --seconds $(or $(SECONDS),120)
	OMP_NUM_THREADS=1 $(BIN)/python tests/sanitize.py --threads --calls 200 --seconds $(or $(SECONDS),120)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An interpreter with ott-jax, where the environment has none: it runs in a process of its own.
OTT_PYTHON ?= $(BIN)/python
ROWS := benchmarks/results/cpu.csv
MEASURE := $(BIN)/python -m benchmarks
MEASURED := --ott-python $(OTT_PYTHON) --output $(ROWS)

# One machine, nothing else on it: first as a suite of tests, then as rows of the committed CSV.
bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks
	$(MEASURE) solve --threads 1 $(MEASURED)
	$(MEASURE) solve --threads 2 $(MEASURED)
	$(MEASURE) vectors --threads 2 --memory $(MEASURED)
	$(MEASURE) residual --threads 2 --rounds 3 $(MEASURED)
	$(MEASURE) large --threads 2 --rounds 3 --memory $(MEASURED)
	$(MEASURE) accuracy --threads 1 $(MEASURED)

# A machine with a CUDA device: tests, times and sweeps, as far as the seconds go; again for the rest.
OUT ?= benchmarks/results/gpu
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --output $(OUT) --seconds $(or $(SECONDS),520)

plots: $(STAMP)
	$(MEASURE) report

# Registers, spills and hot loops of the CUDA kernels, by nvcc and without a GPU.
cuda-resources: $(STAMP)
	$(BIN)/python -m benchmarks.cuda_resources

clean:
	rm -rf build dist *.egg-info optical/_cpu.* optical/_cuda.* .pytest_cache .mypy_cache .ruff_cache
