"""Public functions of the operator: validation, the registered op and its result."""

from optical.ot.functional import ot_alignment, sinkhorn, sinkhorn_divergence, sinkhorn_vectors
from optical.ot.result import SinkhornResult

__all__ = ["SinkhornResult", "ot_alignment", "sinkhorn", "sinkhorn_divergence", "sinkhorn_vectors"]
