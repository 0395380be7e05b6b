"""Batched, masked optimal transport for token vectors: a Sinkhorn operator and a loss built on it.

The names below are the whole public interface. Importing the package needs PyTorch only: it
queries no device, compiles nothing and loads neither Triton nor the native library.
"""

from optical.backends.problem import Status
from optical.backends.registry import BackendUnsupported
from optical.losses.alignment import OTAlignmentLoss
from optical.ot.functional import ot_alignment, sinkhorn, sinkhorn_divergence, sinkhorn_vectors
from optical.ot.result import SinkhornResult

__version__ = "0.1.0"

__all__ = [
    "BackendUnsupported",
    "OTAlignmentLoss",
    "SinkhornResult",
    "Status",
    "__version__",
    "ot_alignment",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_vectors",
]
