"""What a cost needs to know of each token: its norm, its size, and the centre of its problem.

Read once before the iterations, so that no kernel afterwards needs a whole vector in registers.
"""

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
