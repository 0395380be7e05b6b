"""Triton kernels of the Sinkhorn operator: the launchers, nothing else.

Imported only when the "triton" backend is used, so that the package works without Triton.
"""

from optical.kernels.sinkhorn_backward import sinkhorn_backward
from optical.kernels.sinkhorn_forward import MAX_TOKENS, sinkhorn_forward

__all__ = ["MAX_TOKENS", "sinkhorn_backward", "sinkhorn_forward"]
