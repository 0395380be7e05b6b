"""Streamed iterations in half precision: K is written down once, and then only multiplied with.

    K_ij = 2^14 P_ij / b_j

with P the plan after an exact iteration, whose columns sum to b, lies in device memory as float16.
With F' and G' the potentials at which it was written, a half-step needs no cost and no exponential
of an entry:

    F_i <- F'_i + A_i + 14 - log2 sum_j K_ij exp2(B_j + G_j - G'_j)
    G_j <- G'_j            - log2 sum_i K_ij exp2(F_i - F'_i - 14)

Both half-steps read the same K, so the run is that of costs that are off by epsilon / 2048 at most.
K is written when an exact iteration has moved no potential by more than DRIFT (half-steps never
lengthen a move), and again when potentials are farther than that from F' and G'. What float16
cannot hold is below 2^-39 of a column; in a row that weighs at least 2^-16 of all, it stays below
2^-11 of the sum. Problems with lighter rows keep to exact iterations, and so do the last iteration
of a run and those that decide where it stops.
"""

import triton
import triton.language as tl
from optical.kernels.streamed.logsumexp import MINIMA, walk
from optical.kernels.tiles import INFINITY, NO_PAIR, cost_tile, load_log_mass

# How far potentials may be from where K was written, in powers of two.
DRIFT = tl.constexpr(6.0)
# The column sums of K, and the lightest row, in powers of two.
TOP = tl.constexpr(14.0)
LIGHTEST = tl.constexpr(-16.0)
# What a problem does next: exact iterations to the end, an exact one, one with K, and K first.
NEVER = tl.constexpr(-1)
EXACT = tl.constexpr(0)
KEPT = tl.constexpr(1)
WRITE = tl.constexpr(2)
# So many iterations must be left for K to pay.
PAYS = tl.constexpr(4)


@triton.jit
def consider(log_mass_ptr, n, BLOCK: tl.constexpr):
    """Whether no row is too light for K."""
    least = tl.full((BLOCK,), INFINITY, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        A = load_log_mass(log_mass_ptr, zero + tl.arange(0, BLOCK), n)
        least = tl.minimum(least, tl.where(A != -INFINITY, A, INFINITY))
        total += tl.exp2(A)
    heavy = tl.exp2(tl.min(least, 0)) >= tl.exp2(LIGHTEST) * tl.sum(total, 0)
    return tl.where(heavy, EXACT, NEVER)


@triton.jit
def proceed(state, moved, settled, left):
    """The state after an iteration that ended ``moved`` from its origin, with ``left`` to come."""
    following = tl.where(left >= 2, KEPT, EXACT)
    following = tl.where(state == EXACT, tl.where(left >= PAYS, WRITE, EXACT), following)
    following = tl.where((moved <= DRIFT) & settled, following, EXACT)
    return tl.where(state == NEVER, NEVER, following)


@triton.jit
def keep(costs, rows, columns, kept, first, step, scale, HOW: tl.constexpr, TILE: tl.constexpr):
    """Write K of the rows from ``first`` in steps, and zeros up to whole tiles.

    ``rows`` and ``columns``: masses, and potentials of an exact iteration.
    """
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_M: tl.constexpr = TILE[1]
    kept_ptr, width = kept
    n = costs[0][4]
    m = costs[1][4]
    for row_zero in range(first, n, step):
        i = row_zero + tl.arange(0, BLOCK_N)
        F = tl.load(rows[1] + i, mask=i < n, other=NO_PAIR)
        A = load_log_mass(rows[0], i, n)
        for column_zero in range(0, m, BLOCK_M):
            j = column_zero + tl.arange(0, BLOCK_M)
            G = tl.load(columns[1] + j, mask=j < m, other=NO_PAIR)
            cost = cost_tile(costs, row_zero, column_zero, HOW, TILE)
            allowed = (F < NO_PAIR)[:, None] & (G < NO_PAIR)[None, :] & (cost < INFINITY)
            score = (F + A + TOP)[:, None] + (G[None, :] - cost * scale)
            K = tl.exp2(tl.where(allowed, score, -INFINITY)).to(tl.float16)
            tl.store(kept_ptr + i[:, None] * width + j[None, :], K)


@triton.jit
def multiply(own, other, kept, n, m, first, step, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The minima of the lines of one side from ``first`` in steps, by products with K."""
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_M: tl.constexpr = TILE[1]
    kept_ptr, width = kept
    for own_zero in range(first, n, step):
        i = own_zero + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for other_zero in range(0, m, BLOCK_M):
            j = other_zero + tl.arange(0, BLOCK_M)
            start = tl.load(other[4] + j, mask=j < m, other=NO_PAIR)
            weight = tl.load(other[1] + j, mask=j < m, other=0.0) - start
            if ROWS:
                weight += load_log_mass(other[0], j, m)
                offsets = i[:, None] * width + j[None, :]
            else:
                weight -= TOP
                offsets = j[None, :] * width + i[:, None]
            weight = tl.exp2(tl.where(start < NO_PAIR, weight, -INFINITY))
            total += tl.load(kept_ptr + offsets).to(tl.float32) * weight[None, :]
        total = tl.sum(total, 1)
        start = tl.load(own[4] + i, mask=i < n, other=NO_PAIR)
        found = start - tl.log2(tl.where(start < NO_PAIR, total, 1.0))
        if ROWS:
            found += load_log_mass(own[0], i, n) + TOP
        tl.store(own[2] + i, tl.where(start < NO_PAIR, found, NO_PAIR), mask=i < n)


@triton.jit
def half_step(
    costs,
    own,
    other,
    kept,
    state,
    first,
    step,
    scale,
    ratio,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
    HOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """The minima of one side, in the way that the state of the problem says."""
    if FAST:
        if state > EXACT:
            multiply(own, other, kept, costs[0][4], costs[1][4], first, step, ROWS, TILE)
        else:
            walk(costs, own, other, first, step, scale, ratio, MINIMA, HOW, TILE)
    else:
        walk(costs, own, other, first, step, scale, ratio, MINIMA, HOW, TILE)
