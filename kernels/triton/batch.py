"""The problems of a call as the kernels read them, and the tiles that serve them."""

import os
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from optical.arguments import Arguments
from optical.kernels import tuning
from optical.kernels.tiles import COSINE, INFINITY, SQEUCLIDEAN, extent

KINDS = {"given": 0, "cosine": 1, "sqeuclidean": 2, "dot": 3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit(do_not_specialize=["n", "m", "dim"])
def centre_kernel(
    x_ptr,
    y_ptr,
    cu_a_ptr,
    cu_b_ptr,
    log_a_ptr,
    log_b_ptr,
    centre_ptr,
    n,
    m,
    dim,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The mean of all present tokens of a problem, both sides, BLOCK_D entries of it."""
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.zeros((BLOCK_T,), tl.float32)
    for side in tl.static_range(2):
        vectors_ptr = x_ptr + zero_a * dim if side == 0 else y_ptr + zero_b * dim
        log_mass_ptr = log_a_ptr + zero_a if side == 0 else log_b_ptr + zero_b
        size = n if side == 0 else m
        for t0 in range(0, size, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            present = tl.load(log_mass_ptr + t, mask=t < size, other=-INFINITY) != -INFINITY
            offsets = t.to(tl.int64)[:, None] * dim + d[None, :]
            inside = present[:, None] & (d < dim)[None, :]
            x = tl.load(vectors_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(x, 0)
            count += present.to(tl.float32)
    centre = total / tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(centre_ptr + problem * dim + d, centre, mask=d < dim)


@triton.jit(do_not_specialize=["n", "dim"])
def norm_kernel(
    vectors_ptr,
    cu_ptr,
    centre_ptr,
    norm_ptr,
    scale_ptr,
    n,
    dim,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """1 / |x| of each token (0 for the zero vector), or its |x - centre|^2.

    SCALED: the vector is to be multiplied by a power of two, also stored, before it is used, and
    1 / |x| is that of the scaled one; then no square and no product of two tokens overflows.
    """
    problem = tl.program_id(0).to(tl.int64)
    zero, n = extent(cu_ptr, problem, n, PACKED)
    for t0 in range(tl.program_id(1) * BLOCK_T, n, tl.num_programs(1) * BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        line_ptr = vectors_ptr + (zero + t).to(tl.int64)[:, None] * dim
        factor = tl.zeros((BLOCK_T,), tl.float32) + 1.0
        if KIND == COSINE:
            peak = tl.zeros((BLOCK_T,), tl.float32)
            for d0 in range(0, dim, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                inside = (t < n)[:, None] & (d < dim)[None, :]
                x = tl.load(line_ptr + d[None, :], mask=inside, other=0.0).to(tl.float32)
                peak = tl.maximum(peak, tl.max(tl.abs(x), 1))
            # exp2 of a whole number is exact. A vector that holds no number stays one that does.
            usual = (peak > 0) & (peak < INFINITY)
            power = tl.floor(tl.log2(tl.where(usual, peak, 1.0)))
            factor = tl.exp2(-tl.minimum(tl.maximum(power, -120.0), 120.0))
        square = tl.zeros((BLOCK_T,), tl.float32)
        for d0 in range(0, dim, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = (t < n)[:, None] & (d < dim)[None, :]
            x = tl.load(line_ptr + d[None, :], mask=inside, other=0.0).to(tl.float32)
            if KIND == SQEUCLIDEAN:
                x -= tl.load(centre_ptr + problem * dim + d, mask=d < dim, other=0.0)[None, :]
            else:
                x = x * factor[:, None]
            square += tl.sum(x * x, 1)
        if KIND == COSINE:
            # Padding may hold anything, and a zero would divide.
            some = square != 0
            norm = tl.where(some, 1 / tl.sqrt(tl.where(some, square, 1.0)), 0.0)
            if SCALED:
                tl.store(scale_ptr + zero + t, factor, mask=t < n)
            else:
                norm = norm * factor
        else:
            norm = square
        tl.store(norm_ptr + zero + t, norm, mask=t < n)


class Batch:
    """The problems as the kernels read them: pointers, sizes and what is known of each token."""

    def __init__(self, arguments: Arguments) -> None:
        p = self.arguments = arguments
        self.size = len(p.epsilon)
        self.packed = p.packed
        self.n, self.m = p.log_a.shape[-1], p.log_b.shape[-1]
        self.kind = KINDS[p.kind]
        self.strides = p.x.stride() if p.y is None else (0, 0, 0)
        self.dim = 0 if p.y is None else p.x.shape[-1]
        self.nvidia = torch.version.hip is None and not INTERPRETED
        single = p.x.dtype == torch.float32
        self.single = single
        # Products of float32 numbers lose nothing that matters, products of half precision nothing.
        self.exact = "tf32x3" if self.nvidia else "ieee"
        self.precision = "ieee" if p.y is None else self.exact
        if not single and p.kind != "sqeuclidean":
            self.precision = "ieee"
        # Gradients are rounded to the vectors' dtype, and what pulls at them to one as fine: TF32
        # holds every float16, and a pull in float16 would underflow.
        self.pull, self.pull_precision = tl.float32, self.exact
        if self.nvidia and p.x.dtype == torch.bfloat16:
            self.pull = tl.bfloat16
        elif self.nvidia and p.x.dtype == torch.float16:
            self.pull_precision = "tf32"
        self.scaled = p.kind == "cosine" and single
        # Offsets from the beginning of a problem, where 32 bits are not enough for them.
        reach = max(self.n, self.m) * max(1, self.dim)
        if p.y is None:
            reach = self.n * self.strides[1] + self.m * self.strides[2]
        self.wide = reach >= 2**31
        # Where nothing is read, any pointer serves.
        none = p.epsilon
        self.y = none if p.y is None else p.y
        self.cu_a, self.cu_b = (none if x is None else x for x in (p.cu_a, p.cu_b))
        self.norm_a = self.norm_b = self.scale_a = self.scale_b = self.centre = none
        if p.kind == "sqeuclidean":
            self.centre = torch.empty(self.size, self.dim, device=p.x.device)
            block = 64
            grid = (self.size, triton.cdiv(self.dim, block))
            centre_kernel[grid](
                p.x,
                p.y,
                self.cu_a,
                self.cu_b,
                p.log_a,
                p.log_b,
                self.centre,
                self.n,
                self.m,
                self.dim,
                PACKED=self.packed,
                BLOCK_T=32,
                BLOCK_D=block,
            )
        if p.kind in ("cosine", "sqeuclidean"):
            self.norm_a, self.scale_a = self._norms(p.x, self.cu_a, p.log_a)
            self.norm_b, self.scale_b = self._norms(self.y, self.cu_b, p.log_b)

    def _norms(self, vectors: Tensor, offsets: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
        norm, scale = torch.empty_like(log_mass), torch.empty_like(log_mass)
        lines, block = log_mass.shape[-1], 16
        # With offsets nobody here knows how long a problem is; each program takes every so many.
        splits = min(triton.cdiv(lines, block), max(1, 4096 // self.size))
        norm_kernel[(self.size, splits)](
            vectors,
            offsets,
            self.centre,
            norm,
            scale,
            lines,
            self.dim,
            KIND=self.kind,
            PACKED=self.packed,
            SCALED=self.scaled,
            BLOCK_T=block,
            BLOCK_D=max(16, min(128, triton.next_power_of_2(self.dim))),
        )
        return norm, scale

    def sources(self, swapped: bool = False) -> tuple[Tensor, ...]:
        """The pointers from which a tile of the cost is made, in the order of the kernels."""
        p = self.arguments
        x, y = (p.x, self.y) if p.y is not None else (p.x, p.x)
        tokens = [(x, y), (self.norm_a, self.norm_b), (self.scale_a, self.scale_b)]
        lines = [(self.cu_a, self.cu_b), (p.log_a, p.log_b)]
        order = (1, 0) if swapped else (0, 1)
        of_tokens, of_lines = (
            [pair[i] for pair in pairs for i in order] for pairs in (tokens, lines)
        )
        return *of_tokens, self.centre, *of_lines, p.epsilon

    def sizes(self, swapped: bool = False) -> tuple[int, ...]:
        """The strides of a given cost, the longest sides, and how long a vector is."""
        batch, row, column = self.strides
        if swapped:
            return batch, column, row, self.m, self.n, self.dim
        return batch, row, column, self.n, self.m, self.dim

    def warps(self, wanted: int) -> int:
        """How many warps share a program for which a table has ``wanted``."""
        return wanted if torch.version.hip is None else min(wanted, tuning.AMD_WARPS)

    def blocks(self, lines: int, block: int) -> int:
        """How many programs share the lines of a problem; packed ones may have any share of all."""
        count: int = triton.cdiv(lines, block)
        return count if not self.packed else min(count, max(1, 1024 // self.size))


def tiles_of(batch: Batch, table: dict[int, tuning.Tile]) -> list[tuple[int, tuning.Tile]]:
    """The tiles to launch: one where the longest side is known, otherwise all that may be met."""
    longest = max(batch.n, batch.m)
    if table is tuning.TILES and longest > tuning.RESIDENT and not batch.packed:
        for tile in tuning.OBLONG:
            if batch.n <= tile.rows and batch.m <= tile.columns:
                return [(longest, tile)]
    fitting = [(side, tile) for side, tile in table.items() if side >= longest]
    if not batch.packed:
        return fitting[:1]
    last = fitting[0][0] if fitting else max(table)
    return [(side, tile) for side, tile in table.items() if side <= last]


def starts(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Where to start; any pointer where that is 0."""
    p = arguments
    return (p.epsilon if p.f0 is None else p.f0), (p.epsilon if p.g0 is None else p.g0)


def tile_options(batch: Batch, tile: tuning.Tile) -> dict[str, Any]:
    """What every kernel of tiles is told of its problems and of its tile."""
    return {
        "KIND": batch.kind,
        "PACKED": batch.packed,
        "SCALED": batch.scaled,
        "WIDE": batch.wide,
        "PRECISION": batch.precision,
        "BLOCK_N": tile.rows,
        "BLOCK_M": tile.columns,
        "BLOCK_D": tile.depth,
        "WARPS_N": tile.warps_n,
        "WARPS_M": tile.warps_m,
        "num_warps": batch.warps(tile.warps),
        "num_stages": tile.stages,
    }
