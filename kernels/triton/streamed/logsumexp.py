"""Online log-sum-exp over cost tiles, for problems whose plan does not fit in registers.

Costs are recomputed tile by tile with a running maximum and sum per row, so only vectors and
potentials are stored. Columns are reduced in segments of 512, which are merged in a fixed order:
the result does not depend on how rows and columns are split over programs. ``row_side`` and
``column_side`` are tuples of pointers to log-masses, potentials, results, cost sums and base
potentials. Units are those of ``tiles``.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import INFINITY, NO_PAIR, cost_tile, load_log_mass

# Columns per segment.
SEGMENT = tl.constexpr(512)
# Reductions of a row.
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
    """Add one tile to the running reduction of its rows.

    ``running`` holds the largest score, the sum of exponentials relative to it, and the least cost.
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
    """Merge the maxima and sums of two segments; (-inf, 0) is the neutral element."""
    new_peak = tl.maximum(peak, other_peak)
    shift = tl.where(new_peak > -INFINITY, new_peak, 0.0)
    total *= tl.exp2(tl.where(peak > -INFINITY, peak - shift, 0.0))
    other_total *= tl.exp2(tl.where(other_peak > -INFINITY, other_peak - shift, 0.0))
    return new_peak, total + other_total


@triton.jit
def merge_stored(peak_ptr, total_ptr, rows, n, peak, total, stop):
    """Merge the segment that ends at column ``stop`` with the stored earlier ones."""
    tl.debug_barrier()
    has_earlier = (rows < n) & (stop > SEGMENT)
    other_peak = tl.load(peak_ptr + rows, mask=has_earlier, other=-INFINITY)
    other_total = tl.load(total_ptr + rows, mask=has_earlier, other=0.0)
    tl.debug_barrier()
    return merge(other_peak, other_total, peak, total)


@triton.jit
def softmin(peak, total, least_cost, ratio):
    """Return the soft-min of a reduction, or ``NO_PAIR`` for a row without an allowed pair."""
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
    """Reduce the rows from ``first_row`` in strides of ``row_step``.

    REDUCE is SOFTMIN for soft-mins of the scores, or SUMS for the sums of P and of P * C. The
    result is ``NO_PAIR`` for a row without an allowed pair, and for SUMS NaN if a cost is NaN or
    -inf.
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
                    # A segment needs every register, so the result so far is spilled to memory.
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
                # Comparisons with NaN are false; a cost of -inf is invalid as well.
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
    """Reduce every ``segment_step``-th segment of the rows and store the partial results.

    ``partial_ptr`` receives maximum, sum and least cost, ``row_count`` numbers each, per segment.
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
