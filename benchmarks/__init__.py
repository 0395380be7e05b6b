"""Benchmark harness of the project, run from a checkout; ``benchmarks/README.md`` is its guide."""
