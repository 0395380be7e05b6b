"""What is measured: batches of transport problems between token clouds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Batch x n x m x dim x iterations. The CPU's are an eighth of the GPU's batches.
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
# Of aligned tokens, in units of their own size: partners have a cosine of 0.55 on average. Clearer
# pairs are found in one iteration, and vaguer ones are soon as good as random.
NOISE = 1.5
DATA = ("random", "aligned", "clusters", "mixed", "ragged")


class Inputs(NamedTuple):
    """One case in float64: token vectors, log-masses (-inf = padding) and how many are real.

    The vectors are exact in float32, so that no dtype has other inputs than another.
    """

    x: Tensor
    y: Tensor
    log_a: Tensor
    log_b: Tensor
    lengths_a: Tensor
    lengths_b: Tensor

    @property
    def absent(self) -> Tensor:
        """(batch, n, m) bool, True where either token is padding."""
        return (self.log_a == -math.inf)[:, :, None] | (self.log_b == -math.inf)[:, None, :]


@dataclass(frozen=True)
class Case:
    """A batch of problems, and how far to iterate.

    Attributes:
        data: "random": independent clouds. "aligned": noisy copies of the same tokens in another
            order, as translations are. "clusters": two antipodal groups, whose sizes do not fit.
            "mixed": random and aligned in turn. "ragged": aligned clouds of log-normal lengths,
            padded. Masses are uniform: peers start where we do for those only.
        tol: what a provider's own stopping rule is given; 0 runs exactly ``max_iter`` iterations.
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
        shape = "x".join(map(str, (self.batch, self.n, self.m, self.dim, self.max_iter)))
        return shape if self.data == "aligned" else f"{shape}:{self.data}"

    @property
    def inputs(self) -> Inputs:
        return _inputs(self.batch, self.n, self.m, self.dim, self.data)

    def cost(self) -> Tensor:
        """Cosine costs (batch, n, m) in float64 but exact in float32, padding included."""
        x, y, *_ = self.inputs
        return (1 - normalize(x, dim=2) @ normalize(y, dim=2).mT).float().double()

    @property
    def padding_cost(self) -> float:
        """What peers without masks read at padding, beside zero masses.

        They start from scalings of one, so that padding takes part in the first half-step. This is
        far enough above any cosine cost to weigh nothing there, and does not underflow.
        """
        return 2 + 20 * self.epsilon

    def visits(self) -> int:
        """Multiply-adds that the iterations need: each reads every entry of the kernel twice."""
        lengths = self.inputs.lengths_a * self.inputs.lengths_b
        return 2 * self.max_iter * int(lengths.sum())

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        return cls(**{**values, "dtype": getattr(torch, values["dtype"])})


def parse_shape(text: str, **options: Any) -> Case:
    """The case of ``"64x128x128x768x50"`` or ``"64x128x128x768x50:ragged"``."""
    shape, _, data = text.partition(":")
    parts = shape.split("x")
    if len(parts) != 5 or not all(part.isdigit() and int(part) > 0 for part in parts):
        wanted = "BATCHxNxMxDIMxITERATIONS, as in 64x128x128x768x50"
        raise ValueError(f"shape is {text!r}; expected {wanted}")
    if data and data not in DATA:
        raise ValueError(f"data of {text!r} is {data!r}; expected one of {', '.join(DATA)}")
    batch, n, m, dim, max_iter = map(int, parts)
    case = Case(batch, n, m, dim, max_iter, **options)
    return replace(case, data=data) if data else case


@functools.lru_cache(maxsize=2)
def _inputs(batch: int, n: int, m: int, dim: int, data: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    size = max(n, m)
    tokens, noise, norms = normal(batch, size, dim), normal(batch, size, dim), normal(batch, size)
    lengths_a, lengths_b = torch.full((batch,), n), torch.full((batch,), m)
    log_a, log_b = torch.zeros(batch, n).double(), torch.zeros(batch, m).double()
    if data == "ragged":
        # A text and its translation: log-normal lengths, close to one another.
        length = (n / 3) * (0.6 * normal(batch)).exp()
        lengths_a = _clipped(length, n)
        lengths_b = _clipped(length * (0.2 * normal(batch)).exp() * m / n, m)
        log_a = log_a.masked_fill(torch.arange(n) >= lengths_a[:, None], -math.inf)
        log_b = log_b.masked_fill(torch.arange(m) >= lengths_b[:, None], -math.inf)
    if data == "clusters":
        # Antipodal, so that costs between the groups are near 2; mass has to cross all the same.
        centre = 2 * math.sqrt(dim) * normalize(normal(batch, 1, dim), dim=2)
        x = noise[:, :n] + centre * _signs(n, 0.8)
        y = tokens[:, :m] + centre * _signs(m, 0.3)
    else:
        order = torch.randperm(size, generator=generator)
        partners = (tokens + NOISE * noise)[:, order]
        independent = {"random": slice(None), "mixed": slice(0, None, 2)}.get(data, slice(0))
        partners[independent] = noise[independent]
        x, y = tokens[:, :n], partners[:, :m]
    # Of different norms, as token vectors are before the cosine.
    x, y = (x * (0.3 * norms[:, :n, None]).exp()).float().double(), y.float().double()
    log_a, log_b = log_a.log_softmax(1), log_b.log_softmax(1)
    return Inputs(x, y, log_a, log_b, lengths_a, lengths_b)


def _signs(size: int, share: float) -> Tensor:
    """(size, 1) of +1 for the first share of the rows and -1 for the rest."""
    return torch.where(torch.arange(size) < share * size, 1.0, -1.0).double()[:, None]


def _clipped(length: Tensor, size: int) -> Tensor:
    return length.round().clamp(min(8, size), size).long()
