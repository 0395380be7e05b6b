"""Streamed iterations with a plan stored in half precision.

    K_ij = 2^14 P_ij / b_j

P is the plan after an exact iteration, whose columns sum to b; K is stored as float16 in device
memory. With F' and G' the base potentials at which it was stored, a half-step needs no cost and
no exponential per entry:

    F_i <- F'_i + A_i + 14 - log2 sum_j K_ij exp2(B_j + G_j - G'_j)
    G_j <- G'_j            - log2 sum_i K_ij exp2(F_i - F'_i - 14)

Both half-steps read the same K, so the run is that of costs perturbed by at most epsilon / 2048.
K is stored once an exact iteration moves no potential by more than DRIFT (half-steps never
increase the largest move), and again when potentials are farther than DRIFT from F' and G'.
Entries that float16 cannot hold are below 2^-39 of their column; in a row with at least 2^-16 of
the total mass they stay below 2^-11 of the row sum. Problems with lighter rows run exact iterations
only. The last iteration of a run, and those that decide whether it stops, are exact too.
"""

import triton
import triton.language as tl
from optical.kernels.streamed.logsumexp import SOFTMIN, reduce_rows
from optical.kernels.tiles import INFINITY, NO_PAIR, cost_tile, load_log_mass

# Largest distance of potentials from the base potentials of K, in powers of two.
DRIFT = tl.constexpr(6.0)
# Column sums of K, and the smallest share of the mass in a row, in powers of two.
LOG2_COLUMN_SUM = tl.constexpr(14.0)
LOG2_MIN_ROW_MASS = tl.constexpr(-16.0)
# States of a problem: exact iterations until the end; the next iteration is exact; it multiplies
# with K; it stores K and multiplies with it.
STATE_EXACT_ONLY = tl.constexpr(-1)
STATE_EXACT = tl.constexpr(0)
STATE_MULTIPLY = tl.constexpr(1)
STATE_STORE = tl.constexpr(2)
# Fewest remaining iterations for which storing K pays off.
MIN_REMAINING = tl.constexpr(4)


@triton.jit
def initial_state(log_mass_ptr, n, BLOCK: tl.constexpr):
    """Return the initial state of a problem, by the mass of its lightest row."""
    lightest = tl.full((BLOCK,), INFINITY, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for block_start in range(0, n, BLOCK):
        A = load_log_mass(log_mass_ptr, block_start + tl.arange(0, BLOCK), n)
        lightest = tl.minimum(lightest, tl.where(A != -INFINITY, A, INFINITY))
        total += tl.exp2(A)
    heavy = tl.exp2(tl.min(lightest, 0)) >= tl.exp2(LOG2_MIN_ROW_MASS) * tl.sum(total, 0)
    return tl.where(heavy, STATE_EXACT, STATE_EXACT_ONLY)


@triton.jit
def next_state(state, change, at_epsilon, remaining):
    """Return the state after an iteration.

    ``change`` is the largest move of a potential (see ``update_potential``), ``at_epsilon`` whether
    annealing has reached epsilon, and ``remaining`` the number of iterations to come. The first row
    that applies decides:

        state         condition                                   next state
        EXACT_ONLY                                                EXACT_ONLY
        any           change > DRIFT or not at_epsilon            EXACT
        EXACT         remaining >= MIN_REMAINING                  STORE
        EXACT         otherwise                                   EXACT
        STORE,        remaining >= 2                              MULTIPLY
        MULTIPLY      otherwise (the last iteration is exact)     EXACT

    Independently, a problem in STORE or MULTIPLY whose marginal error falls below ``tol`` becomes
    EXACT_ONLY, so that exact iterations decide where it stops.
    """
    following = tl.where(remaining >= 2, STATE_MULTIPLY, STATE_EXACT)
    following = tl.where(
        state == STATE_EXACT,
        tl.where(remaining >= MIN_REMAINING, STATE_STORE, STATE_EXACT),
        following,
    )
    following = tl.where((change <= DRIFT) & at_epsilon, following, STATE_EXACT)
    return tl.where(state == STATE_EXACT_ONLY, STATE_EXACT_ONLY, following)


@triton.jit
def store_plan(
    costs, rows, columns, stored, first_row, row_step, scale, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """Store K for the rows from ``first_row`` in strides of ``row_step``.

    Rows and columns are zero-padded to whole tiles. ``rows`` and ``columns`` are pointers to
    log-masses and to the potentials of an exact iteration.
    """
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_M: tl.constexpr = TILE[1]
    plan_ptr, width = stored
    n = costs[0][4]
    m = costs[1][4]
    for row_start in range(first_row, n, row_step):
        i = row_start + tl.arange(0, BLOCK_N)
        F = tl.load(rows[1] + i, mask=i < n, other=NO_PAIR)
        A = load_log_mass(rows[0], i, n)
        for column_start in range(0, m, BLOCK_M):
            j = column_start + tl.arange(0, BLOCK_M)
            G = tl.load(columns[1] + j, mask=j < m, other=NO_PAIR)
            cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
            allowed = (F < NO_PAIR)[:, None] & (G < NO_PAIR)[None, :] & (cost < INFINITY)
            score = (F + A + LOG2_COLUMN_SUM)[:, None] + (G[None, :] - cost * scale)
            K = tl.exp2(tl.where(allowed, score, -INFINITY)).to(tl.float16)
            tl.store(plan_ptr + i[:, None] * width + j[None, :], K)


@triton.jit
def multiply_plan(
    row_side, column_side, stored, n, m, first_row, row_step, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """Compute the soft-mins of one side by products with K."""
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_M: tl.constexpr = TILE[1]
    plan_ptr, width = stored
    for row_start in range(first_row, n, row_step):
        i = row_start + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for column_start in range(0, m, BLOCK_M):
            j = column_start + tl.arange(0, BLOCK_M)
            base = tl.load(column_side[4] + j, mask=j < m, other=NO_PAIR)
            weight = tl.load(column_side[1] + j, mask=j < m, other=0.0) - base
            if ROWS:
                weight += load_log_mass(column_side[0], j, m)
                offsets = i[:, None] * width + j[None, :]
            else:
                weight -= LOG2_COLUMN_SUM
                offsets = j[None, :] * width + i[:, None]
            weight = tl.exp2(tl.where(base < NO_PAIR, weight, -INFINITY))
            total += tl.load(plan_ptr + offsets).to(tl.float32) * weight[None, :]
        total = tl.sum(total, 1)
        base = tl.load(row_side[4] + i, mask=i < n, other=NO_PAIR)
        softmin = base - tl.log2(tl.where(base < NO_PAIR, total, 1.0))
        if ROWS:
            softmin += load_log_mass(row_side[0], i, n) + LOG2_COLUMN_SUM
        tl.store(row_side[2] + i, tl.where(base < NO_PAIR, softmin, NO_PAIR), mask=i < n)


@triton.jit
def half_step(
    costs,
    row_side,
    column_side,
    stored,
    state,
    first_row,
    row_step,
    scale,
    ratio,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute the soft-mins of one side, exactly or from K, as the state of the problem demands."""
    if FAST:
        if state > STATE_EXACT:
            multiply_plan(
                row_side,
                column_side,
                stored,
                costs[0][4],
                costs[1][4],
                first_row,
                row_step,
                ROWS,
                TILE,
            )
        else:
            reduce_rows(
                costs, row_side, column_side, first_row, row_step, scale, ratio, SOFTMIN, SPEC, TILE
            )
    else:
        reduce_rows(
            costs, row_side, column_side, first_row, row_step, scale, ratio, SOFTMIN, SPEC, TILE
        )
