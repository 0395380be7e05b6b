"""What is measured: batches of problems between token clouds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# batch x n x m x iterations. The paper's training batch is near the first; the others move the
# weight from start-up cost to the iteration itself, and from the first cache level to the second.
CPU_SHAPES = ("128x64x64x50", "64x128x128x50", "512x32x32x20", "16x256x256x100")
GPU_SHAPES = ("4096x32x32x20", "1024x64x64x50", "512x128x128x50", "64x512x512x100")


@dataclass(frozen=True)
class Case:
    """A batch of dense problems of one size, run for a fixed number of iterations."""

    batch: int
    n: int
    m: int
    max_iter: int
    epsilon: float = 0.05
    dim: int = 128
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.n}x{self.m}x{self.max_iter}"

    def cost(self) -> Tensor:
        """Cosine costs (batch, n, m) in float64 between noisy copies of the same tokens.

        Translated sentences are like that: most tokens have a partner, and partners differ.
        """
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, max(self.n, self.m), self.dim)
        tokens = torch.randn(size, generator=generator, dtype=torch.float64)
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        student = torch.nn.functional.normalize(tokens[:, : self.n], dim=2)
        teacher = torch.nn.functional.normalize((tokens + noise)[:, : self.m], dim=2)
        return 1 - student @ teacher.mT


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """(batch, n, m, iterations) of ``"128x64x64x50"``."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"shape is {text!r}; expected BATCHxNxMxITERATIONS, as in 128x64x64x50")
    batch, n, m, max_iter = map(int, parts)
    return batch, n, m, max_iter
