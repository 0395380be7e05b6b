"""Losses on token vectors: alignment, Sinkhorn divergence, and distillation objectives."""

from optical.losses.alignment import OTAlignmentLoss
from optical.losses.distillation import DistillationLoss, OTDistillationLoss, Tokens
from optical.losses.divergence import (
    DivergenceResult,
    SinkhornDivergence,
    sinkhorn_divergence,
)
from optical.losses.objectives import (
    ContrastiveBitextLoss,
    GreedyDistillationLoss,
    PooledDistillationLoss,
    PositionDistillationLoss,
)

__all__ = [
    "ContrastiveBitextLoss",
    "DistillationLoss",
    "DivergenceResult",
    "GreedyDistillationLoss",
    "OTAlignmentLoss",
    "OTDistillationLoss",
    "PooledDistillationLoss",
    "PositionDistillationLoss",
    "SinkhornDivergence",
    "Tokens",
    "sinkhorn_divergence",
]
