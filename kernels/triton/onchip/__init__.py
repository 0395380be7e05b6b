"""Kernels for problems whose transport plan fits in the registers of one program."""
