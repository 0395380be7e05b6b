"""The implementations of the operator, and the registry that chooses one."""

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
