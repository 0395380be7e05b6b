"""Triton kernels of the Sinkhorn operator, from the arguments of the operator to its outputs.

Imported only when the "triton" backend is used, so that the package works without Triton.
"""

from optical.kernels.backward import apply_plan, backward
from optical.kernels.forward import forward, supports

__all__ = ["apply_plan", "backward", "forward", "supports"]
