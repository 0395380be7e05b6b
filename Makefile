# Two commands for a fresh machine: `make study` and `make test`. Both build .venv and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Versions tested together; a plain `torch` would bring whatever is newest. For another one, in a
# fresh environment: `make test TORCH='==2.10.0'`, `make test TORCH='>=2.10'`.
ifdef TORCH
$(shell mkdir -p build && sed 's/^torch==[0-9.]*/torch$(TORCH)/' constraints.txt > build/constraints.txt)
export PIP_CONSTRAINT := $(CURDIR)/build/constraints.txt
else
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install study test test-slow test-install check format fuzz fuzz-kernels soak sanitize mutants docs dist bench plots gpu cuda-resources clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt csrc/*.h csrc/cpu/*
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile torch
# A torch with CUDA has brought the Triton that it needs; beside any other, this one was tested.
	test "$$(uname)" != Linux || $(BIN)/python -c 'import triton' 2> /dev/null || \
		$(BIN)/pip install --quiet --no-compile triton==3.6.0
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

# Builds and installs as a stranger does: in isolation, into empty environments.
test-install: $(STAMP)
	$(BIN)/python -m pytest -q -m slow tests/test_packaging.py

# Random calls against the float64 reference, and invalid ones that must be refused.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress --calls 100000 --seconds $(or $(SECONDS),300)

# Random calls of the GPU kernels; without a GPU they run on the CPU, slowly.
fuzz-kernels: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kernels cuda --seconds $(or $(SECONDS),300)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kernels triton --seconds $(or $(SECONDS),300)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kernels streamed --seconds $(or $(SECONDS),300)

# Mixed calls during which memory, open files and threads must stay level.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.soak --minutes $(or $(MINUTES),30)

# Random calls on a library built with the sanitizers of addresses, undefined behaviour and threads.
sanitize: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.sanitize --calls 2000 --seconds $(or $(SECONDS),120)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.sanitize --threads --calls 200 --seconds $(or $(SECONDS),120)

# Small faults planted one at a time, each of which tests or random calls must notice;
# `make mutants LANGUAGE=cpu`, `make mutants ONLY=cpu-gradient`, `make mutants RESUME=1`.
mutants: $(STAMP)
	$(BIN)/python -m tests.stress.mutants $(if $(RESUME),--resume) \
		$(if $(LANGUAGE),--language $(LANGUAGE)) $(if $(ONLY),--only $(ONLY))

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_readme.py -k "one_way or order or links"

# The site in build/site, links and docstrings checked; `make docs SERVE=1` shows it and follows edits.
docs: $(STAMP)
	$(BIN)/mkdocs $(if $(SERVE),serve,build --strict)

# A wheel and a source distribution in dist/, built as a stranger builds them.
dist: $(STAMP)
	$(BIN)/python -m build --outdir dist .

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
