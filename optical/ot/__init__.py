"""Public functions of the operator: validation, the registered op and its result."""

from optical.ot.functional import ot_alignment, sinkhorn, sinkhorn_vectors
from optical.ot.matching import doubly_stochastic, dustbin_matching, partial_transport
from optical.ot.result import SinkhornResult

__all__ = [
    "SinkhornResult",
    "doubly_stochastic",
    "dustbin_matching",
    "ot_alignment",
    "partial_transport",
    "sinkhorn",
    "sinkhorn_vectors",
]
