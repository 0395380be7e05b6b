"""Batched, masked Sinkhorn for token vectors, and a loss and a retrieval package built on it.

The names below, and those that the wings ``backends``, ``data``, ``losses``, ``models``,
``retrieval``, ``study``, ``testing`` and ``training`` export, are public. Importing the package
needs PyTorch only. It queries no device, compiles nothing, and loads neither Triton nor the
compiled libraries.
"""

from optical.backends.problem import Status
from optical.backends.registry import BackendUnsupported
from optical.losses.alignment import OTAlignmentLoss
from optical.losses.divergence import SinkhornDivergence, sinkhorn_divergence
from optical.losses.warmup import warmup
from optical.ot.functional import ot_alignment, sinkhorn, sinkhorn_vectors
from optical.ot.result import SinkhornResult

__version__ = "0.1.0"

__all__ = [
    "BackendUnsupported",
    "OTAlignmentLoss",
    "SinkhornDivergence",
    "SinkhornResult",
    "Status",
    "__version__",
    "ot_alignment",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_vectors",
    "warmup",
]
