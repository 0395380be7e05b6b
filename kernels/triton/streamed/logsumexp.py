"""The parts of a streamed run: walks over the costs of some rows, and what is done with the lines.

A walk makes the costs again tile by tile and keeps a running maximum and a running sum for each
row, so memory holds vectors and potentials and nothing else. The columns are summed in segments and
these are joined in one order, whoever shares them and the rows. Potentials are in the units of
``resident``.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import INFINITY, NO_PAIR, cost_tile, load_log_mass

# Columns of a segment.
SEGMENT = tl.constexpr(512)
# What a walk looks for.
SOFTMIN = tl.constexpr(0)
SUMS = tl.constexpr(1)


@triton.jit
def accumulate_scores(
    costs,
    A,
    column_side,
    row_start,
    column_start,
    running,
    scale,
    ratio,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """What minima are made of, a tile later.

    For each row the greatest score, the sum of all beside it, and the least cost.
    """
    log_b_ptr, G_ptr, _, _, _ = column_side
    peak, total, least_cost = running
    m = costs[1][4]
    columns = column_start + tl.arange(0, TILE[1])
    B = load_log_mass(log_b_ptr, columns, m)
    G = tl.load(G_ptr + columns, mask=columns < m, other=0.0)
    cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
    valid = (A != -INFINITY)[:, None] & (B != -INFINITY)[None, :]
    cost = tl.where(valid, cost, INFINITY)
    least_cost = tl.minimum(least_cost, tl.min(cost, 1))
    score = (G[None, :] - cost * scale) * ratio + B[None, :]
    score = tl.where(cost < INFINITY, score, -INFINITY)
    new_peak = tl.maximum(peak, tl.max(score, 1))
    shift = tl.where(new_peak > -INFINITY, new_peak, 0.0)
    total *= tl.exp2(tl.where(peak > -INFINITY, peak - shift, 0.0))
    total += tl.sum(tl.exp2(score - shift[:, None]), 1)
    return new_peak, total, least_cost


@triton.jit
def merge(peak, total, other_peak, other_total):
    """The greatest score and the sum of two segments; those of one alone with -inf and 0."""
    new_peak = tl.maximum(peak, other_peak)
    shift = tl.where(new_peak > -INFINITY, new_peak, 0.0)
    total *= tl.exp2(tl.where(peak > -INFINITY, peak - shift, 0.0))
    other_total *= tl.exp2(tl.where(other_peak > -INFINITY, other_peak - shift, 0.0))
    return new_peak, total + other_total


@triton.jit
def merge_stored(peak_ptr, total_ptr, rows, n, peak, total, stop):
    """A segment that ends with column ``end``, and those before it."""
    tl.debug_barrier()
    has_earlier = (rows < n) & (stop > SEGMENT)
    other_peak = tl.load(peak_ptr + rows, mask=has_earlier, other=-INFINITY)
    other_total = tl.load(total_ptr + rows, mask=has_earlier, other=0.0)
    tl.debug_barrier()
    return merge(other_peak, other_total, peak, total)


@triton.jit
def softmin(peak, total, least_cost, ratio):
    """What was found: ``NO_PAIR`` for a row without an allowed pair."""
    has_pair = least_cost < INFINITY
    result = -(peak + tl.log2(tl.where(has_pair, total, 1.0))) / ratio
    return tl.where(has_pair, result, NO_PAIR)


@triton.jit
def reduce_rows(
    costs,
    row_side,
    column_side,
    first_row,
    row_step,
    scale,
    ratio,
    REDUCE: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """For the rows from ``first`` in steps: their minima, or their sums of P and of P * C.

    Found is ``NO_PAIR`` for a row without an allowed pair, and NaN where a cost is no number.
    ``own``, ``other``: masses, potentials, and for the rows where to put what is found and spent.
    """
    log_a_ptr = row_side[0]
    F_ptr = row_side[1]
    result_ptr = row_side[2]
    cost_sum_ptr = row_side[3]
    log_b_ptr = column_side[0]
    G_ptr = column_side[1]
    n = costs[0][4]
    m = costs[1][4]
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_M: tl.constexpr = TILE[1]
    for row_start in range(first_row, n, row_step):
        rows = row_start + tl.arange(0, BLOCK_N)
        A = load_log_mass(log_a_ptr, rows, n)
        total = tl.zeros((BLOCK_N,), tl.float32)
        least_cost = tl.full((BLOCK_N,), INFINITY, tl.float32)
        if REDUCE == SOFTMIN:
            peak = tl.full((BLOCK_N,), -INFINITY, tl.float32)
            for column_start in range(0, m, BLOCK_M):
                if (column_start > 0) & (column_start % SEGMENT.value == 0):
                    # A segment needs every register; what came before waits in memory.
                    peak, total = merge_stored(
                        result_ptr, cost_sum_ptr, rows, n, peak, total, column_start
                    )
                    tl.store(result_ptr + rows, peak, mask=rows < n)
                    tl.store(cost_sum_ptr + rows, total, mask=rows < n)
                    peak = tl.full((BLOCK_N,), -INFINITY, tl.float32)
                    total = tl.zeros((BLOCK_N,), tl.float32)
                peak, total, least_cost = accumulate_scores(
                    costs,
                    A,
                    column_side,
                    row_start,
                    column_start,
                    (peak, total, least_cost),
                    scale,
                    ratio,
                    SPEC,
                    TILE,
                )
            if m > SEGMENT:
                peak, total = merge_stored(result_ptr, cost_sum_ptr, rows, n, peak, total, m)
            result = softmin(peak, total, least_cost, ratio)
        else:
            F = tl.load(F_ptr + rows, mask=rows < n, other=0.0)
            cost_sum = tl.zeros((BLOCK_N,), tl.float32)
            not_finite = tl.zeros((BLOCK_N,), tl.float32)
            for column_start in range(0, m, BLOCK_M):
                columns = column_start + tl.arange(0, BLOCK_M)
                B = load_log_mass(log_b_ptr, columns, m)
                G = tl.load(G_ptr + columns, mask=columns < m, other=0.0)
                cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
                valid = (A != -INFINITY)[:, None] & (B != -INFINITY)[None, :]
                cost = tl.where(valid, cost, INFINITY)
                least_cost = tl.minimum(least_cost, tl.min(cost, 1))
                score = F[:, None] + G[None, :] - cost * scale + (A[:, None] + B[None, :])
                allowed = cost < INFINITY
                plan = tl.exp2(tl.where(allowed, score, -INFINITY))
                total += tl.sum(plan, 1)
                cost_sum += tl.sum(plan * tl.where(allowed, cost, 0.0), 1)
                # NaN compares with nothing, and a cost of -inf is no cost either.
                not_finite = tl.maximum(not_finite, tl.max(tl.where(cost > -INFINITY, 0.0, 1.0), 1))
            result = tl.where(least_cost < INFINITY, total, NO_PAIR)
            result = tl.where(not_finite > 0, float("nan"), result)
            tl.store(cost_sum_ptr + rows, cost_sum, mask=rows < n)
        tl.store(result_ptr + rows, result, mask=rows < n)


@triton.jit
def reduce_segments(
    costs,
    row_side,
    column_side,
    partial_ptr,
    row_count,
    first_row,
    row_step,
    segment,
    segment_step,
    scale,
    ratio,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """As ``walk`` for minima, but of every ``segments``-th segment alone; ``part_ptr`` keeps them.

    Each has three numbers for each of ``lines`` rows.
    """
    n = costs[0][4]
    m = costs[1][4]
    wide_row_count = row_count.to(tl.int64)
    for row_start in range(first_row, n, row_step):
        rows = row_start + tl.arange(0, TILE[0])
        A = load_log_mass(row_side[0], rows, n)
        for start in range(segment * SEGMENT, m, segment_step * SEGMENT):
            stop = tl.minimum(start + SEGMENT, m)
            peak = tl.full((TILE[0],), -INFINITY, tl.float32)
            total = tl.zeros((TILE[0],), tl.float32)
            least_cost = tl.full((TILE[0],), INFINITY, tl.float32)
            for column_start in range(start, stop, TILE[1]):
                peak, total, least_cost = accumulate_scores(
                    costs,
                    A,
                    column_side,
                    row_start,
                    column_start,
                    (peak, total, least_cost),
                    scale,
                    ratio,
                    SPEC,
                    TILE,
                )
            target = partial_ptr + start // SEGMENT * 3 * wide_row_count + rows
            tl.store(target, peak, mask=rows < n)
            tl.store(target + row_count, total, mask=rows < n)
            tl.store(target + 2 * row_count, least_cost, mask=rows < n)
