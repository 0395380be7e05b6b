# `make study` and `make test` are enough on a fresh machine: both create .venv and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The versions that are tested together. To test another one, in a fresh environment:
# `make test TORCH='==2.10.0'` or `make test TORCH='>=2.10'`.
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
# A CUDA build of torch brings its own Triton; this version is tested with the other builds.
	test "$$(uname)" != Linux || $(BIN)/python -c 'import triton' 2> /dev/null || \
		$(BIN)/pip install --quiet --no-compile triton==3.6.0
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

study: $(STAMP)
	$(BIN)/optical study $(CONFIG)

# The tests create every model and text they need; nothing is downloaded.
test test-slow: export HF_HUB_OFFLINE := 1
test test-slow: export TOKENIZERS_PARALLELISM := false
# The problems are tiny, so a second thread costs more than it saves.
test test-slow: export OMP_NUM_THREADS := 1

# Triton reads TRITON_INTERPRET when the kernels are imported, so the interpreter needs its own process.
# Two processes share the tests; WORKERS=0 runs them in one.
test: $(STAMP)
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(PARALLEL) -m "not slow" tests/kernels/interpreter

PARALLEL = -n $(or $(WORKERS),2) --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m slow tests/kernels/interpreter

# Builds in isolation and installs into empty environments, as a new user does.
test-install: $(STAMP)
	$(BIN)/python -m pytest -q -m slow tests/project/test_packaging.py

# Random calls, compared with the float64 reference, until the time is up.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress --calls 100000 --seconds $(or $(SECONDS),300)

# Random calls of the GPU kernels; without a GPU they run emulated on the CPU, slowly.
fuzz-kernels: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kernels cuda --seconds $(or $(SECONDS),300)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kernels triton --seconds $(or $(SECONDS),300)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kernels streamed --seconds $(or $(SECONDS),300)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kernels triton-ptx --seconds $(or $(SECONDS),300)

# Mixed calls, with a watch on memory, open files and threads.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.soak --minutes $(or $(MINUTES),30)

# Random calls under the address and undefined-behaviour sanitizers, then under the thread sanitizer.
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
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/project/test_structure.py tests/project/test_readme.py -k "wings or links"

# Build the site into build/site, with strict checks; `make docs SERVE=1` serves it and reloads on edits.
docs: $(STAMP)
	$(BIN)/mkdocs $(if $(SERVE),serve,build --strict)

# A wheel and a source distribution in dist/, built in isolation.
dist: $(STAMP)
	$(BIN)/python -m build --outdir dist .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An interpreter that has ott-jax, if the environment has none; it runs in a separate process.
OTT_PYTHON ?= $(BIN)/python
ROWS := benchmarks/results/cpu.csv
MEASURE := $(BIN)/python -m benchmarks
MEASURED := --ott-python $(OTT_PYTHON) --output $(ROWS)

# Needs a quiet machine. Runs the benchmarks as tests first, then writes the rows of the committed CSV.
bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks
	$(MEASURE) solve --threads 1 $(MEASURED)
	$(MEASURE) solve --threads 2 $(MEASURED)
	$(MEASURE) vectors --threads 2 --memory $(MEASURED)
	$(MEASURE) residual --threads 2 --rounds 3 $(MEASURED)
	$(MEASURE) large --threads 2 --rounds 3 --memory $(MEASURED)
	$(MEASURE) accuracy --threads 1 $(MEASURED)

# Needs a CUDA device, PyTorch and Triton, and installs nothing: builds, times and tests everything
# within SECONDS. `make gpu REHEARSE=1` does the same on a CPU, with stand-ins for the device.
OUT ?= benchmarks/results/gpu
gpu:
	$(PYTHON) -m benchmarks.gpu --output $(OUT) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(REHEARSE),--rehearse)

plots: $(STAMP)
	$(MEASURE) report

# Registers, spills and inner loops of the CUDA kernels; needs nvcc, no GPU.
cuda-resources: $(STAMP)
	$(BIN)/python -m benchmarks.machine_code.cuda

clean:
	rm -rf build dist *.egg-info optical/_cpu.* optical/_cuda.* .pytest_cache .mypy_cache .ruff_cache
