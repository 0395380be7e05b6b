"""The parts of a streamed run: walks over the costs of some rows, and what is done with the lines.

A walk makes the costs again tile by tile and keeps a running maximum and a running sum for each
row, so memory holds vectors and potentials and nothing else. The columns are summed in segments and
these are joined in one order, whoever shares them and the rows. Potentials are in the units of
``resident``.
"""

import triton
import triton.language as tl
from optical.kernels.resident import (
    CONVERGED,
    EMPTY,
    INFEASIBLE,
    MASS_TOLERANCE,
    MAX_ITER,
    penalties,
    wanted,
)
from optical.kernels.tiles import INFINITY, LOG2_E, cost_tile, load_log_mass

# Columns of a segment.
SEGMENT = tl.constexpr(512)
# What a walk looks for.
MINIMA = tl.constexpr(0)
SUMS = tl.constexpr(1)
# In the place of what a line without an allowed pair does not have.
DEAD = tl.constexpr(3e38)


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
    """What was found: ``DEAD`` for a row without an allowed pair."""
    alive = lowest < INFINITY
    found = -(peak + tl.log2(tl.where(alive, total, 1.0))) / ratio
    return tl.where(alive, found, DEAD)


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

    Found is ``DEAD`` for a row without an allowed pair, and NaN where a cost is no number.
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
            found = tl.where(lowest < INFINITY, total, DEAD)
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


@triton.jit
def miss(own, n, ratio, strength, BLOCK: tl.constexpr):
    """How far the sums behind found minima are from those wanted, in L1."""
    log_mass_ptr = own[0]
    F_ptr = own[1]
    found_ptr = own[2]
    missed = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        F = tl.load(F_ptr + index, mask=index < n, other=0.0)
        found = tl.load(found_ptr + index, mask=index < n, other=DEAD)
        alive = found < DEAD
        sums = tl.where(alive, tl.exp2(A + (F - found) * ratio), 0.0)
        missed += tl.abs(sums - wanted(A, alive, F, strength))
    return tl.sum(missed, 0)


@triton.jit
def relax(own, n, relaxation, beta, state, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """Move the potentials of one side towards the minima found; those of dead lines are 0.

    With FAST, return how far they end from where an exact iteration found them, or in the states
    of ``kept`` above 0 from where K was written; and note where an exact one leaves them.
    """
    F_ptr = own[1]
    found_ptr = own[2]
    moved = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        origin = tl.load(F_ptr + index, mask=index < n, other=0.0)
        found = tl.load(found_ptr + index, mask=index < n, other=DEAD)
        F = tl.where(found == DEAD, 0.0, (1 - relaxation) * origin + beta * found)
        tl.store(F_ptr + index, F, mask=index < n)
        if FAST:
            start = tl.load(own[4] + index, mask=index < n, other=DEAD)
            origin = tl.where(state > 0, start, origin)
            moved = tl.maximum(moved, tl.where(found == DEAD, 0.0, tl.abs(F - origin)))
            start = tl.where(found == DEAD, DEAD, F)
            tl.store(own[4] + index, start, mask=(index < n) & (state <= 0))
    return tl.max(moved, 0)


@triton.jit
def begin(F_ptr, start_ptr, n, scale, START: tl.constexpr, BLOCK: tl.constexpr):
    """Write where one side begins."""
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        F = tl.zeros((BLOCK,), tl.float32)
        if START:
            F = tl.load(start_ptr + index, mask=index < n, other=0.0) * scale
            # What stands at an absent line may be no number; it has no plan to be multiplied with.
            F = tl.where(tl.abs(F) < INFINITY, F, 0.0)
        tl.store(F_ptr + index, F, mask=index < n)


@triton.jit
def inspect(start_ptr, log_mass_ptr, n, START: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the numbers of one side cannot be read, whether it has a line, and its mass."""
    some = tl.zeros((BLOCK,), tl.float32)
    unreadable = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        if START:
            F = tl.load(start_ptr + index, mask=(index < n) & (A != -INFINITY), other=0.0)
            unreadable = tl.maximum(unreadable, tl.where(tl.abs(F) < INFINITY, 0.0, 1.0))
        unreadable = tl.maximum(unreadable, tl.where(A < INFINITY, 0.0, 1.0))
        some = tl.maximum(some, tl.where(A != -INFINITY, 1.0, 0.0))
        mass += tl.exp2(A)
    return tl.max(unreadable, 0) > 0, tl.max(some, 0) > 0, tl.sum(mass, 0)


@triton.jit
def account(own, n, inverse_rho, strength, BLOCK: tl.constexpr):
    """What one side has: its part of the dual value, its penalty, its error, its sums, and costs.

    The last two say whether a fixed line is dead and whether a cost is no number.
    """
    log_mass_ptr = own[0]
    F_ptr = own[1]
    found_ptr = own[2]
    spent_ptr = own[3]
    dual = tl.zeros((BLOCK,), tl.float32)
    price = tl.zeros((BLOCK,), tl.float32)
    missed = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    paid = tl.zeros((BLOCK,), tl.float32)
    dead = tl.zeros((BLOCK,), tl.float32)
    unreadable = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        found = tl.load(found_ptr + index, mask=index < n, other=DEAD)
        # A sum beyond float32 is a sum.
        alive = found != DEAD
        F = tl.load(F_ptr + index, mask=index < n, other=0.0)
        F = tl.where(found == DEAD, 0.0, F)
        tl.store(F_ptr + index, F, mask=index < n)
        a = tl.exp2(A)
        sums = tl.where(alive, found, 0.0)
        dual += sums * F
        total += sums
        missed += tl.abs(sums - wanted(A, alive, F, strength))
        paid += tl.load(spent_ptr + index, mask=index < n, other=0.0)
        dead = tl.maximum(dead, tl.where((A != -INFINITY) & (found == DEAD), 1.0, 0.0))
        unreadable = tl.maximum(unreadable, tl.where(found == found, 0.0, 1.0))
        if inverse_rho > 0:
            price += penalties(sums, A, a) / inverse_rho
    return (
        tl.sum(dual, 0),
        tl.sum(price, 0),
        tl.sum(missed, 0),
        tl.sum(total, 0),
        tl.sum(paid, 0),
        tl.max(dead, 0) > 0,
        tl.max(unreadable, 0) > 0,
    )


@triton.jit
def finish(
    problem,
    epsilon,
    readable,
    starts,
    rows,
    columns,
    outputs,
    n,
    m,
    iteration,
    stop,
    max_iter,
    inverse_rho_a,
    inverse_rho_b,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The outputs of one problem, after a walk for the sums of each side.

    ``rows`` and ``columns``: masses, potentials, and what the walks found and saw spent.
    """
    value_ptr, value_linear_ptr, marginal_error_ptr, n_iter_ptr, status_ptr = outputs
    strength_a = epsilon * inverse_rho_a
    strength_b = epsilon * inverse_rho_b
    scale = LOG2_E / epsilon
    unreadable_a, some_a, mass_a = inspect(starts[0], rows[0], n, START, BLOCK)
    unreadable_b, some_b, mass_b = inspect(starts[1], columns[0], m, START, BLOCK)
    empty = (some_a == 0) | (some_b == 0)
    dual, price, error, total, transported, dead_a, unreadable = account(
        rows, n, inverse_rho_a, strength_a, BLOCK
    )
    value = dual / scale + price + epsilon * (mass_a * mass_b - total)
    dual, price, error_b, total, _, dead_b, _ = account(
        columns, m, inverse_rho_b, strength_b, BLOCK
    )
    value += dual / scale + price
    error += error_b
    fixed_a = inverse_rho_a == 0
    fixed_b = inverse_rho_b == 0
    unequal = tl.abs(mass_a - mass_b) > tl.maximum(mass_a, mass_b) * MASS_TOLERANCE
    infeasible = (fixed_a & dead_a) | (fixed_b & dead_b) | (fixed_a & fixed_b & unequal)
    broken = (readable == 0) | unreadable | unreadable_a | unreadable_b
    broken = broken & (empty == 0)
    status = tl.where(stop, CONVERGED, MAX_ITER)
    status = tl.where(broken | infeasible, INFEASIBLE, status)
    status = tl.where(empty, EMPTY, status)
    iteration = tl.where(empty, 0, tl.where(broken, max_iter, iteration))
    tl.store(value_ptr + problem, tl.where(empty, 0.0, tl.where(broken, float("nan"), value)))
    transported = tl.where(empty, 0.0, tl.where(broken, float("nan"), transported))
    tl.store(value_linear_ptr + problem, transported)
    tl.store(
        marginal_error_ptr + problem, tl.where(empty, 0.0, tl.where(broken, float("nan"), error))
    )
    tl.store(n_iter_ptr + problem, iteration)
    tl.store(status_ptr + problem, status)
    end(rows[1], rows[0], n, scale, empty, broken, BLOCK)
    end(columns[1], columns[0], m, scale, empty, broken, BLOCK)


@triton.jit
def end(F_ptr, log_mass_ptr, n, scale, empty, broken, BLOCK: tl.constexpr):
    """Potentials in the units of the cost."""
    tl.debug_barrier()
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        F = tl.load(F_ptr + index, mask=index < n, other=0.0) / scale
        F = tl.where(broken, float("nan"), F)
        F = tl.where((A == -INFINITY) | empty, 0.0, F)
        tl.store(F_ptr + index, F, mask=index < n)
