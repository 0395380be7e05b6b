"""Registers, spills and loop instructions of the GPU kernels, measured without a GPU."""
