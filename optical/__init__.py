"""Batched, masked optimal transport for token vectors: a Sinkhorn operator and a loss built on it.

The names below are the whole public interface. Importing the package needs PyTorch only: it
queries no device, compiles nothing and loads neither Triton nor the native library.
"""

from optical.arguments import Status
from optical.backends import BackendUnsupported
from optical.functional import ot_alignment, sinkhorn, sinkhorn_divergence, sinkhorn_vectors
from optical.losses import OTAlignmentLoss
from optical.result import SinkhornResult

__version__ = "0.1.0.dev0"

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
