"""Kernels over single tokens: their norms, and equal masses for them."""
