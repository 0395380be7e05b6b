"""Losses on token vectors: alignment, Sinkhorn divergence, and distillation objectives."""

from optical.losses.alignment import OTAlignmentLoss
from optical.losses.distillation import DistillationLoss, OTDistillationLoss, Tokens
from optical.losses.divergence import SinkhornDivergence
from optical.losses.objectives import (
    ContrastiveBitextLoss,
    GreedyDistillationLoss,
    PooledDistillationLoss,
    PositionDistillationLoss,
)

__all__ = [
    "ContrastiveBitextLoss",
    "DistillationLoss",
    "GreedyDistillationLoss",
    "OTAlignmentLoss",
    "OTDistillationLoss",
    "PooledDistillationLoss",
    "PositionDistillationLoss",
    "SinkhornDivergence",
    "Tokens",
]
