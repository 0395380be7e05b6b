"""Alignment and distillation losses as PyTorch modules."""

from optical.losses.alignment import OTAlignmentLoss
from optical.losses.distillation import DistillationLoss, OTDistillationLoss
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
]
