"""Losses on token vectors: optimal transport alignment, and distillation objectives."""

from optical.losses.alignment import OTAlignmentLoss
from optical.losses.distillation import DistillationLoss, OTDistillationLoss, Tokens
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
    "Tokens",
]
