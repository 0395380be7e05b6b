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
MINIMA = tl.constexpr(0)
SUMS = tl.constexpr(1)


@triton.jit
def look(
    costs,
    A,
    other,
    row_zero,
    column_zero,
    seen,
    scale,
    ratio,
    HOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """What minima are made of, a tile later.

    For each row the greatest score, the sum of all beside it, and the least cost.
    """
    log_b_ptr, G_ptr, _, _, _ = other
    peak, total, lowest = seen
    m = costs[1][4]
    columns = column_zero + tl.arange(0, TILE[1])
    B = load_log_mass(log_b_ptr, columns, m)
    G = tl.load(G_ptr + columns, mask=columns < m, other=0.0)
    cost = cost_tile(costs, row_zero, column_zero, HOW, TILE)
    present = (A != -INFINITY)[:, None] & (B != -INFINITY)[None, :]
    cost = tl.where(present, cost, INFINITY)
    lowest = tl.minimum(lowest, tl.min(cost, 1))
    score = (G[None, :] - cost * scale) * ratio + B[None, :]
    score = tl.where(cost < INFINITY, score, -INFINITY)
    higher = tl.maximum(peak, tl.max(score, 1))
    anchor = tl.where(higher > -INFINITY, higher, 0.0)
    total *= tl.exp2(tl.where(peak > -INFINITY, peak - anchor, 0.0))
    total += tl.sum(tl.exp2(score - anchor[:, None]), 1)
    return higher, total, lowest


@triton.jit
def join(peak, total, more_peak, more_total):
    """The greatest score and the sum of two segments; those of one alone with -inf and 0."""
    higher = tl.maximum(peak, more_peak)
    anchor = tl.where(higher > -INFINITY, higher, 0.0)
    total *= tl.exp2(tl.where(peak > -INFINITY, peak - anchor, 0.0))
    more_total *= tl.exp2(tl.where(more_peak > -INFINITY, more_peak - anchor, 0.0))
    return higher, total + more_total


@triton.jit
def recall(peak_ptr, total_ptr, rows, n, peak, total, end):
    """A segment that ends with column ``end``, and those before it."""
    tl.debug_barrier()
    before = (rows < n) & (end > SEGMENT)
    more_peak = tl.load(peak_ptr + rows, mask=before, other=-INFINITY)
    more_total = tl.load(total_ptr + rows, mask=before, other=0.0)
    tl.debug_barrier()
    return join(more_peak, more_total, peak, total)


@triton.jit
def minimum(peak, total, lowest, ratio):
    """What was found: ``NO_PAIR`` for a row without an allowed pair."""
    alive = lowest < INFINITY
    found = -(peak + tl.log2(tl.where(alive, total, 1.0))) / ratio
    return tl.where(alive, found, NO_PAIR)


@triton.jit
def walk(
    costs,
    own,
    other,
    first,
    step,
    scale,
    ratio,
    SEEN: tl.constexpr,
    HOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """For the rows from ``first`` in steps: their minima, or their sums of P and of P * C.

    Found is ``NO_PAIR`` for a row without an allowed pair, and NaN where a cost is no number.
    ``own``, ``other``: masses, potentials, and for the rows where to put what is found and spent.
    """
    log_a_ptr = own[0]
    F_ptr = own[1]
    found_ptr = own[2]
    spent_ptr = own[3]
    log_b_ptr = other[0]
    G_ptr = other[1]
    n = costs[0][4]
    m = costs[1][4]
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_M: tl.constexpr = TILE[1]
    for row_zero in range(first, n, step):
        rows = row_zero + tl.arange(0, BLOCK_N)
        A = load_log_mass(log_a_ptr, rows, n)
        total = tl.zeros((BLOCK_N,), tl.float32)
        lowest = tl.full((BLOCK_N,), INFINITY, tl.float32)
        if SEEN == MINIMA:
            peak = tl.full((BLOCK_N,), -INFINITY, tl.float32)
            for column_zero in range(0, m, BLOCK_M):
                if (column_zero > 0) & (column_zero % SEGMENT.value == 0):
                    # A segment needs every register; what came before waits in memory.
                    peak, total = recall(found_ptr, spent_ptr, rows, n, peak, total, column_zero)
                    tl.store(found_ptr + rows, peak, mask=rows < n)
                    tl.store(spent_ptr + rows, total, mask=rows < n)
                    peak = tl.full((BLOCK_N,), -INFINITY, tl.float32)
                    total = tl.zeros((BLOCK_N,), tl.float32)
                peak, total, lowest = look(
                    costs,
                    A,
                    other,
                    row_zero,
                    column_zero,
                    (peak, total, lowest),
                    scale,
                    ratio,
                    HOW,
                    TILE,
                )
            if m > SEGMENT:
                peak, total = recall(found_ptr, spent_ptr, rows, n, peak, total, m)
            found = minimum(peak, total, lowest, ratio)
        else:
            F = tl.load(F_ptr + rows, mask=rows < n, other=0.0)
            spent = tl.zeros((BLOCK_N,), tl.float32)
            unreadable = tl.zeros((BLOCK_N,), tl.float32)
            for column_zero in range(0, m, BLOCK_M):
                columns = column_zero + tl.arange(0, BLOCK_M)
                B = load_log_mass(log_b_ptr, columns, m)
                G = tl.load(G_ptr + columns, mask=columns < m, other=0.0)
                cost = cost_tile(costs, row_zero, column_zero, HOW, TILE)
                present = (A != -INFINITY)[:, None] & (B != -INFINITY)[None, :]
                cost = tl.where(present, cost, INFINITY)
                lowest = tl.minimum(lowest, tl.min(cost, 1))
                score = F[:, None] + G[None, :] - cost * scale + (A[:, None] + B[None, :])
                allowed = cost < INFINITY
                plan = tl.exp2(tl.where(allowed, score, -INFINITY))
                total += tl.sum(plan, 1)
                spent += tl.sum(plan * tl.where(allowed, cost, 0.0), 1)
                # NaN compares with nothing, and a cost of -inf is no cost either.
                unreadable = tl.maximum(unreadable, tl.max(tl.where(cost > -INFINITY, 0.0, 1.0), 1))
            found = tl.where(lowest < INFINITY, total, NO_PAIR)
            found = tl.where(unreadable > 0, float("nan"), found)
            tl.store(spent_ptr + rows, spent, mask=rows < n)
        tl.store(found_ptr + rows, found, mask=rows < n)


@triton.jit
def walk_segments(
    costs,
    own,
    other,
    part_ptr,
    lines,
    first,
    step,
    segment,
    segments,
    scale,
    ratio,
    HOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """As ``walk`` for minima, but of every ``segments``-th segment alone; ``part_ptr`` keeps them.

    Each has three numbers for each of ``lines`` rows.
    """
    n = costs[0][4]
    m = costs[1][4]
    wide_lines = lines.to(tl.int64)
    for row_zero in range(first, n, step):
        rows = row_zero + tl.arange(0, TILE[0])
        A = load_log_mass(own[0], rows, n)
        for start in range(segment * SEGMENT, m, segments * SEGMENT):
            end = tl.minimum(start + SEGMENT, m)
            peak = tl.full((TILE[0],), -INFINITY, tl.float32)
            total = tl.zeros((TILE[0],), tl.float32)
            lowest = tl.full((TILE[0],), INFINITY, tl.float32)
            for column_zero in range(start, end, TILE[1]):
                peak, total, lowest = look(
                    costs,
                    A,
                    other,
                    row_zero,
                    column_zero,
                    (peak, total, lowest),
                    scale,
                    ratio,
                    HOW,
                    TILE,
                )
            target = part_ptr + start // SEGMENT * 3 * wide_lines + rows
            tl.store(target, peak, mask=rows < n)
            tl.store(target + lines, total, mask=rows < n)
            tl.store(target + 2 * lines, lowest, mask=rows < n)
