"""Kernels for larger problems, whose costs are recomputed tile by tile in every half-step."""
