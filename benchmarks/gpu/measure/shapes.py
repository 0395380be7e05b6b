"""The timed batches, their token vectors, and the machine they are measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optical.testing.cases import Case

# Standard deviation of the noise between aligned tokens; see benchmarks/operator/cases.py.
NOISE = 1.5
# Inputs of one timed run together exceed the L2 cache of the largest device.
ROTATED_BYTES = 128e6
MOST_SETS = 320
# Multiply-adds of one timed run, beyond which no further sets of inputs are rotated.
MOST_VISITS = 2e9


class Shape(NamedTuple):
    """A batch of problems.

    Attributes:
        floor_us: time of the bytes, products and multiply-adds of a bfloat16 forward pass on an
            H200; 0 if unknown.
        ragged: lengths differ, as in text; the rest of a problem is padding.
    """

    name: str
    batch: int
    n: int
    m: int
    dim: int
    max_iter: int
    epsilon: float = 0.05
    floor_us: float = 0
    ragged: bool = False

    @property
    def problem(self) -> str:
        sizes = "x".join(map(str, (self.batch, self.n, self.m, self.dim, self.max_iter)))
        return f"{sizes}:ragged" if self.ragged else sizes

    def sets(self, dtype: torch.dtype) -> int:
        """Number of inputs that rotate, so that none is read from the cache."""
        size = self.batch * (self.n + self.m) * self.dim * dtype.itemsize
        visits = self.batch * self.n * self.m * self.max_iter
        wanted = min(MOST_SETS, math.ceil(ROTATED_BYTES / size), int(MOST_VISITS / visits))
        return max(2, wanted)


def _by_name(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


# Most valuable first; ``SHAPES`` of ``benchmarks.gpu.builds`` repeats the names.
SHAPES = _by_name(
    Shape("T3", 512, 128, 128, 768, 50, floor_us=56),
    Shape("L2", 1, 128, 128, 768, 50),
    Shape("T1", 4096, 32, 32, 128, 20, floor_us=16),
    Shape("T2", 1024, 64, 64, 256, 50, floor_us=22),
    Shape("T4", 512, 96, 160, 768, 50, floor_us=52, ragged=True),
    Shape("T5", 256, 256, 256, 1024, 100, floor_us=189),
    Shape("T6", 64, 512, 512, 768, 100, floor_us=178),
    Shape("T7", 32, 512, 512, 1024, 200, epsilon=0.01, floor_us=161),
    Shape("T8", 8, 2048, 2048, 128, 100, floor_us=802),
    Shape("T9", 1, 16384, 16384, 64, 10, floor_us=642),
)
# The same names for a rehearsal on a CPU, one size for every regime of the CUDA kernels.
REHEARSED = _by_name(
    Shape("T3", 3, 70, 66, 24, 17),
    Shape("L2", 1, 66, 66, 16, 3),
    Shape("T1", 5, 9, 12, 16, 3),
    Shape("T2", 2, 40, 34, 16, 17),
    Shape("T4", 3, 20, 30, 16, 3, ragged=True),
    Shape("T5", 1, 40, 140, 16, 3),
    Shape("T6", 1, 140, 150, 16, 3),
    Shape("T7", 1, 33, 20, 16, 3, epsilon=0.01),
    Shape("T8", 1, 20, 18, 16, 3),
    Shape("T9", 1, 18, 20, 16, 2),
)


@dataclass
class Machine:
    """The device and the length of a measurement. A rehearsal changes the one instance.

    Attributes:
        rounds: timed runs of a graph.
        calls: timed calls from Python.
        sets: upper bound of the rotated inputs.
        compiler: backend of ``torch.compile`` for the peers.
    """

    device: str = "cuda"
    name: str = ""
    rounds: int = 15
    calls: int = 20
    sets: int = MOST_SETS
    compiler: str = "inductor"
    rehearsal: bool = False

    @property
    def shapes(self) -> dict[str, Shape]:
        return REHEARSED if self.rehearsal else SHAPES


MACHINE = Machine()


def draw(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Case:
    """Make aligned clouds on the device, as ``benchmarks.operator.cases`` does on the CPU.

    Returns:
        A case whose vectors are in ``dtype`` and all other tensors in float32.
    """
    batch, n, m, dim = shape[1:5]
    generator = torch.Generator(MACHINE.device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": MACHINE.device}
    tokens = torch.randn(batch, max(n, m), dim, **options)
    partners = (tokens + NOISE * torch.randn(tokens.shape, **options))[
        :, torch.randperm(max(n, m), **options)
    ]
    log_a, log_b = tokens.new_zeros(batch, n), tokens.new_zeros(batch, m)
    if shape.ragged:
        # A text and its translation have similar lengths; both are log-normal.
        length = (n / 3) * (0.6 * torch.randn(batch, **options)).exp()
        other = length * (0.2 * torch.randn(batch, **options)).exp() * m / n
        log_a, log_b = _masses(length, log_a), _masses(other, log_b)
    return Case(
        shape.name,
        tokens[:, :n].to(dtype).contiguous(),
        log_a.log_softmax(1),
        log_b.log_softmax(1),
        tokens.new_full((batch,), shape.epsilon),
        shape.max_iter,
        y=partners[:, :m].to(dtype).contiguous(),
        kind="cosine",
    )


def _masses(lengths: Tensor, like: Tensor) -> Tensor:
    size = like.shape[1]
    lengths = lengths.round().clamp(min(8, size), size)
    position = torch.arange(size, device=like.device)
    return like.masked_fill(position >= lengths[:, None], -math.inf)


def draw_sets(shape: Shape, dtype: torch.dtype) -> list[Case]:
    """Make the inputs that rotate during a timed run."""
    count = min(MACHINE.sets, shape.sets(dtype))
    return [draw(shape, dtype, seed) for seed in range(count)]
