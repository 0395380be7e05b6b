"""Losses on token vectors (alignment, divergence, distillation), and their compilation ahead."""

from optical.losses.alignment import OTAlignmentLoss
from optical.losses.distillation import (
    DistillationLoss,
    DivergenceDistillationLoss,
    OTDistillationLoss,
    Tokens,
)
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
from optical.losses.warmup import Compiled, warmup

__all__ = [
    "Compiled",
    "ContrastiveBitextLoss",
    "DistillationLoss",
    "DivergenceDistillationLoss",
    "DivergenceResult",
    "GreedyDistillationLoss",
    "OTAlignmentLoss",
    "OTDistillationLoss",
    "PooledDistillationLoss",
    "PositionDistillationLoss",
    "SinkhornDivergence",
    "Tokens",
    "sinkhorn_divergence",
    "warmup",
]
