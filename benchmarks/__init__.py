"""Benchmarks of the operator: ``python -m benchmarks sinkhorn``, or ``pytest benchmarks``."""
