"""Measurements on a device, each a step of ``python -m benchmarks.gpu.measure``."""
