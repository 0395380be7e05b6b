"""Everything that needs a GPU, in one command of a few minutes: ``python -m benchmarks.gpu``."""
