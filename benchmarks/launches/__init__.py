"""Host time of calls that launch Triton kernels, over a driver that does nothing."""
