"""Norms of the tokens of both sides of a batch, and the centres of problems."""

from typing import NamedTuple

from torch import Tensor

import triton
import triton.language as tl
from optical.kernels.tiles import COSINE, INFINITY, SQEUCLIDEAN, extent


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
    """Compute BLOCK_D entries of the mean of a problem's valid tokens, both sides together."""
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.zeros((BLOCK_T,), tl.float32)
    for side in tl.static_range(2):
        vectors_ptr = x_ptr + offset_a * dim if side == 0 else y_ptr + offset_b * dim
        log_mass_ptr = log_a_ptr + offset_a if side == 0 else log_b_ptr + offset_b
        size = n if side == 0 else m
        for t0 in range(0, size, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            valid = tl.load(log_mass_ptr + t, mask=t < size, other=-INFINITY) != -INFINITY
            offsets = t.to(tl.int64)[:, None] * dim + d[None, :]
            mask = valid[:, None] & (d < dim)[None, :]
            x = tl.load(vectors_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(x, 0)
            count += valid.to(tl.float32)
    centre = total / tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(centre_ptr + problem * dim + d, centre, mask=d < dim)


@triton.jit
def store_norms(
    vectors_ptr,
    cu_ptr,
    centre_ptr,
    norm_ptr,
    scale_ptr,
    problem,
    part,
    parts,
    n,
    dim,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the norms of every ``parts``-th block of tokens of one side of a problem.

    Sums stay one per entry of a tile until the end: reducing each tile would cost more shuffles
    than loads.
    """
    offset, n = extent(cu_ptr, problem, n, PACKED)
    for t0 in range(part * BLOCK_T, n, parts * BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        row_ptr = vectors_ptr + (offset + t).to(tl.int64)[:, None] * dim
        factor = tl.zeros((BLOCK_T,), tl.float32) + 1.0
        # Squares of float16 neither overflow nor vanish in float32.
        if KIND == COSINE and (SCALED or vectors_ptr.dtype.element_ty != tl.float16):
            peaks = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            for d0 in range(0, dim, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                mask = (t < n)[:, None] & (d < dim)[None, :]
                x = tl.load(row_ptr + d[None, :], mask=mask, other=0.0).to(tl.float32)
                peaks = tl.maximum(peaks, tl.abs(x))
            peak = tl.max(peaks, 1)
            # exp2 of an integer is exact. Non-finite vectors are not scaled and stay non-finite.
            normal = (peak > 0) & (peak < INFINITY)
            power = tl.floor(tl.log2(tl.where(normal, peak, 1.0)))
            factor = tl.exp2(-tl.minimum(tl.maximum(power, -120.0), 120.0))
        squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for d0 in range(0, dim, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask = (t < n)[:, None] & (d < dim)[None, :]
            x = tl.load(row_ptr + d[None, :], mask=mask, other=0.0).to(tl.float32)
            if KIND == SQEUCLIDEAN:
                centre = tl.load(centre_ptr + problem * dim + d, mask=d < dim, other=0.0)[None, :]
                x -= centre
            else:
                x = x * factor[:, None]
            squares += x * x
        square = tl.sum(squares, 1)
        if KIND == COSINE:
            # Padding may hold any value, zero included, by which nothing may be divided.
            nonzero = square != 0
            norm = tl.where(nonzero, 1 / tl.sqrt(tl.where(nonzero, square, 1.0)), 0.0)
            if SCALED:
                tl.store(scale_ptr + offset + t, factor, mask=t < n)
            else:
                norm = norm * factor
        else:
            norm = square
        tl.store(norm_ptr + offset + t, norm, mask=t < n)


@triton.jit(do_not_specialize=["n", "m", "parts"])
def norm_kernel(
    x_ptr,
    y_ptr,
    cu_a_ptr,
    cu_b_ptr,
    centre_ptr,
    norm_x_ptr,
    norm_y_ptr,
    scale_x_ptr,
    scale_y_ptr,
    n,
    m,
    dim,
    parts,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute 1 / |x| of each token of both sides (0 for the zero vector), or |x - centre|^2.

    The first ``parts`` programs of a problem serve its rows, the others its columns.

    SCALED: kernels multiply the vector by a power of two, stored as well, before they use it, and
    the norm is that of the scaled vector. No square and no product of two tokens then overflows.
    """
    problem = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < parts:
        store_norms(
            x_ptr,
            cu_a_ptr,
            centre_ptr,
            norm_x_ptr,
            scale_x_ptr,
            problem,
            part,
            parts,
            n,
            dim,
            KIND,
            PACKED,
            SCALED,
            BLOCK_T,
            BLOCK_D,
        )
    else:
        store_norms(
            y_ptr,
            cu_b_ptr,
            centre_ptr,
            norm_y_ptr,
            scale_y_ptr,
            problem,
            part - parts,
            tl.num_programs(1) - parts,
            m,
            dim,
            KIND,
            PACKED,
            SCALED,
            BLOCK_T,
            BLOCK_D,
        )


class Norms(NamedTuple):
    """Norms and scales of all tokens; placeholders where the cost does not need them.

    Attributes:
        centre: (B, dim), the mean of a problem's valid tokens, for squared distances.
        norm_a, norm_b: float32, one per token; see ``norm_kernel``.
        scale_a, scale_b: the powers of two by which vectors are multiplied, one per token.
    """

    centre: Tensor
    norm_a: Tensor
    norm_b: Tensor
    scale_a: Tensor
    scale_b: Tensor
