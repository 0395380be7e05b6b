"""Public functions of the operator: validation, the registered op and its result."""

from optical.ot.divergence import DivergenceResult, sinkhorn_divergence
from optical.ot.functional import ot_alignment, sinkhorn, sinkhorn_vectors
from optical.ot.result import SinkhornResult

__all__ = [
    "DivergenceResult",
    "SinkhornResult",
    "ot_alignment",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_vectors",
]
