"""Batched, masked optimal transport for token vectors: a Sinkhorn operator and a loss built on it.

The names below are the whole public interface. Importing the package needs PyTorch only: it
queries no device, compiles nothing and loads neither Triton nor the native library.
"""

from optical.backends import BackendUnsupported
from optical.functional import SinkhornResult, ot_alignment, sinkhorn
from optical.losses import OTAlignmentLoss

__version__ = "0.1.0.dev0"

__all__ = [
    "BackendUnsupported",
    "OTAlignmentLoss",
    "SinkhornResult",
    "__version__",
    "ot_alignment",
    "sinkhorn",
]
