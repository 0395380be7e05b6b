"""The problems of a call as the kernels read them, and the tiles that serve them."""

import os
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from optical.backends.problem import Problem
from optical.kernels import tuning
from optical.kernels.tokens import centre_kernel, norm_kernel

KINDS = {"given": 0, "cosine": 1, "sqeuclidean": 2, "dot": 3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Batch:
    """The problems as the kernels read them: pointers, sizes and what is known of each token."""

    def __init__(self, arguments: Problem) -> None:
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


def starts(arguments: Problem) -> tuple[Tensor, Tensor]:
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
