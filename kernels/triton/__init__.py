"""Triton backend: solves, differentiates and writes transport plans on NVIDIA and AMD GPUs.

Imported only when the "triton" backend is used, so that the package works without Triton.
"""

from optical.kernels.backward import apply_plan, backward, plan
from optical.kernels.forward import forward, supports

__all__ = ["apply_plan", "backward", "forward", "plan", "supports"]
