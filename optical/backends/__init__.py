"""Backends of the Sinkhorn operator: CPU, CUDA, Triton and a reference in plain PyTorch."""

from optical.backends.problem import Gradients, Problem, Solution, Status
from optical.backends.registry import BACKENDS, BackendUnsupported, explain

__all__ = [
    "BACKENDS",
    "BackendUnsupported",
    "Gradients",
    "Problem",
    "Solution",
    "Status",
    "explain",
]
