"""Benchmark inputs: reproducible batches of transport problems between clouds of token vectors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Batch x n x m x dim x iterations. CPU batches are an eighth of the GPU batches.
CPU_SHAPES = {
    "solve": (
        "512x32x32x128x20",
        "128x64x64x256x50",
        "64x128x128x768x50",
        "16x256x256x1024x100",
        "256x128x128x768x50:ragged",
    ),
    "residual": ("32x128x128x256x5000:mixed",),
    "large": ("1x4096x4096x64x50:random",),
}
GPU_SHAPES = {
    "solve": (
        "4096x32x32x128x20",
        "1024x64x64x256x50",
        "512x128x128x768x50",
        "256x256x256x1024x100",
        "512x128x128x768x50:ragged",
    ),
    "residual": ("512x128x128x768x5000:mixed",),
    "large": ("1x16384x16384x64x50:random",),
}
# Standard deviation of the noise between aligned tokens, relative to that of the tokens. Partners
# have a cosine of 0.55 on average. With less noise, one iteration finds the pairs; with more noise,
# aligned clouds soon behave like random ones.
NOISE = 1.5
DATA = ("random", "aligned", "clusters", "mixed", "ragged")


class Inputs(NamedTuple):
    """The tensors of a case in float64 on the CPU, shared by all providers and dtypes.

    Attributes:
        x, y: token vectors (batch, n, dim) and (batch, m, dim). Every entry is exact in float32, so
            float32 and float64 runs solve the same problem.
        log_a, log_b: log-masses (batch, n) and (batch, m); -inf marks padding.
        lengths_a, lengths_b: (batch,) numbers of valid rows and columns.
    """

    x: Tensor
    y: Tensor
    log_a: Tensor
    log_b: Tensor
    lengths_a: Tensor
    lengths_b: Tensor

    @property
    def padding(self) -> Tensor:
        """(batch, n, m) bool, True where the row or the column is padding."""
        return (self.log_a == -math.inf)[:, :, None] | (self.log_b == -math.inf)[:, None, :]


@dataclass(frozen=True)
class Case:
    """A batch of transport problems with its solver settings.

    Masses are uniform, because the peers share our starting point only for uniform masses.

    Attributes:
        data: "random": independent clouds. "aligned": noisy copies of the same tokens in another
            order, a model of translations. "clusters": two antipodal groups whose sizes differ
            between the two clouds. "mixed": random and aligned problems in alternation. "ragged":
            aligned clouds of log-normal lengths, padded.
        tol: threshold of each provider's stopping rule; 0 runs exactly ``max_iter`` iterations.
    """

    batch: int
    n: int
    m: int
    dim: int
    max_iter: int
    data: str = "aligned"
    epsilon: float = 0.05
    tol: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The text that ``parse_shape`` accepts."""
        shape = "x".join(map(str, (self.batch, self.n, self.m, self.dim, self.max_iter)))
        return shape if self.data == "aligned" else f"{shape}:{self.data}"

    @property
    def inputs(self) -> Inputs:
        return _draw_inputs(self.batch, self.n, self.m, self.dim, self.data)

    def cost(self) -> Tensor:
        """Cosine costs (batch, n, m), padding included: float64, with values exact in float32."""
        x, y, *_ = self.inputs
        return (1 - normalize(x, dim=2) @ normalize(y, dim=2).mT).float().double()

    @property
    def padding_cost(self) -> float:
        """Cost of padded pairs for peers without masks, in addition to zero masses.

        These peers start from scalings of one, so padding enters their first half-step. The value
        is far enough above any cosine cost to have no weight there, yet does not underflow.
        """
        return 2 + 20 * self.epsilon

    def visits(self) -> int:
        """Multiply-adds of all iterations: each iteration reads every kernel entry twice."""
        lengths = self.inputs.lengths_a * self.inputs.lengths_b
        return 2 * self.max_iter * int(lengths.sum())

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; ``from_dict`` inverts this."""
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        """The case with the fields of ``to_dict``."""
        return cls(**{**values, "dtype": getattr(torch, values["dtype"])})


def parse_shape(text: str, **options: Any) -> Case:
    """Parse a shape such as ``"64x128x128x768x50"`` or ``"64x128x128x768x50:ragged"``.

    Args:
        text: BATCHxNxMxDIMxITERATIONS, optionally followed by a colon and a kind of data.
        options: further fields of the case.

    Raises:
        ValueError: the shape or the kind of data is invalid.
    """
    shape, _, data = text.partition(":")
    parts = shape.split("x")
    if len(parts) != 5 or not all(part.isdigit() and int(part) > 0 for part in parts):
        expected = "BATCHxNxMxDIMxITERATIONS, such as 64x128x128x768x50"
        raise ValueError(f"shape is {text!r}; expected {expected}")
    if data and data not in DATA:
        raise ValueError(f"data of {text!r} is {data!r}; expected one of {', '.join(DATA)}")
    batch, n, m, dim, max_iter = map(int, parts)
    case = Case(batch, n, m, dim, max_iter, **options)
    return replace(case, data=data) if data else case


@functools.lru_cache(maxsize=2)
def _draw_inputs(batch: int, n: int, m: int, dim: int, data: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    size = max(n, m)
    tokens, noise, norms = normal(batch, size, dim), normal(batch, size, dim), normal(batch, size)
    lengths_a, lengths_b = torch.full((batch,), n), torch.full((batch,), m)
    log_a, log_b = torch.zeros(batch, n).double(), torch.zeros(batch, m).double()
    if data == "ragged":
        # A text and its translation have similar lengths; both are log-normal.
        length = (n / 3) * (0.6 * normal(batch)).exp()
        lengths_a = _clipped(length, n)
        lengths_b = _clipped(length * (0.2 * normal(batch)).exp() * m / n, m)
        log_a = log_a.masked_fill(torch.arange(n) >= lengths_a[:, None], -math.inf)
        log_b = log_b.masked_fill(torch.arange(m) >= lengths_b[:, None], -math.inf)
    if data == "clusters":
        # Costs between the antipodal groups are near 2, but their sizes force mass to cross.
        centre = 2 * math.sqrt(dim) * normalize(normal(batch, 1, dim), dim=2)
        x = noise[:, :n] + centre * _signs(n, 0.8)
        y = tokens[:, :m] + centre * _signs(m, 0.3)
    else:
        order = torch.randperm(size, generator=generator)
        partners = (tokens + NOISE * noise)[:, order]
        independent = {"random": slice(None), "mixed": slice(0, None, 2)}.get(data, slice(0))
        partners[independent] = noise[independent]
        x, y = tokens[:, :n], partners[:, :m]
    # Token vectors have different norms before the cosine normalises them.
    x, y = (x * (0.3 * norms[:, :n, None]).exp()).float().double(), y.float().double()
    log_a, log_b = log_a.log_softmax(1), log_b.log_softmax(1)
    return Inputs(x, y, log_a, log_b, lengths_a, lengths_b)


def _signs(size: int, share: float) -> Tensor:
    """(size, 1) signs: +1 for the first ``share`` of the rows, -1 for the others."""
    return torch.where(torch.arange(size) < share * size, 1.0, -1.0).double()[:, None]


def _clipped(length: Tensor, size: int) -> Tensor:
    """Lengths rounded to integers between 8 and ``size``."""
    return length.round().clamp(min(8, size), size).long()
