"""The system of ``adjoint`` for problems larger than a chip's registers, one program per problem.

The same conjugate gradients; the plan is made again, tile by tile, for every product, and vectors
wait in device memory. Both products read the same tiles, so that they are those of one matrix.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    INFINITY,
    LOG2_E,
    PATIENCE,
    SOLVED,
    cost_tile,
    extent,
    load_log_mass,
    place,
    plan_tile,
)

# What the sums of a walk are of.
PRODUCT = tl.constexpr(0)
MASS = tl.constexpr(1)
SPENT = tl.constexpr(2)


@triton.jit
def sums(
    costs,
    lines,
    v_ptr,
    sum_ptr,
    scale,
    AXIS: tl.constexpr,
    OF: tl.constexpr,
    HOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """Along axis 1 the sums of each row, along axis 0 of each column: of P v, of P or of P * C.

    ``lines``: masses and potentials of both sides.
    """
    log_a_ptr, log_b_ptr, f_ptr, g_ptr = lines
    x, y, _, _ = costs
    n = x[4]
    m = y[4]
    BLOCK: tl.constexpr = TILE[0]
    tl.debug_barrier()
    own_size = n if AXIS == 1 else m
    other_size = m if AXIS == 1 else n
    for own_zero in range(0, own_size, BLOCK):
        total = tl.zeros((BLOCK,), tl.float64)
        for other_zero in range(0, other_size, BLOCK):
            row_zero = own_zero if AXIS == 1 else other_zero
            column_zero = other_zero if AXIS == 1 else own_zero
            rows = row_zero + tl.arange(0, BLOCK)
            columns = column_zero + tl.arange(0, BLOCK)
            cost = cost_tile(costs, row_zero, column_zero, HOW, TILE)
            A = load_log_mass(log_a_ptr, rows, n)
            B = load_log_mass(log_b_ptr, columns, m)
            f = tl.load(f_ptr + rows, mask=rows < n, other=0.0)
            g = tl.load(g_ptr + columns, mask=columns < m, other=0.0)
            plan = plan_tile(cost, A, B, f, g, scale)
            value = plan.to(tl.float64)
            if OF == SPENT:
                value *= tl.where(plan > 0, cost, 0.0).to(tl.float64)
            elif OF == PRODUCT:
                other = other_zero + tl.arange(0, BLOCK)
                v = tl.load(v_ptr + other, mask=other < other_size, other=0.0)
                value *= tl.expand_dims(v, 1 - AXIS)
            total += tl.sum(value, AXIS)
        own = own_zero + tl.arange(0, BLOCK)
        tl.store(sum_ptr + own, total, mask=own < own_size)
    tl.debug_barrier()


@triton.jit
def load(ptr, index, size):
    return tl.load(ptr + index, mask=index < size, other=0.0)


@triton.jit
def reciprocal(x):
    """1 / x, and 0 of 0."""
    return tl.where(x > 0, 1 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def settle(rest_ptr, diagonal_ptr, m, singular, LINES: tl.constexpr):
    """Take the part along the null vector from the rest, and return its energy."""
    tl.debug_barrier()
    total = tl.zeros((LINES,), tl.float64)
    mass = tl.zeros((LINES,), tl.float64)
    for zero in range(0, m, LINES):
        index = zero + tl.arange(0, LINES)
        total += load(rest_ptr, index, m)
        mass += load(diagonal_ptr, index, m)
    share = tl.where(singular, tl.sum(total, 0) * reciprocal(tl.sum(mass, 0)), 0.0)
    tl.debug_barrier()
    energy = tl.zeros((LINES,), tl.float64)
    for zero in range(0, m, LINES):
        index = zero + tl.arange(0, LINES)
        diagonal = load(diagonal_ptr, index, m)
        rest = load(rest_ptr, index, m) - share * diagonal
        energy += rest * rest * reciprocal(diagonal)
        tl.store(rest_ptr + index, rest, mask=index < m)
    tl.debug_barrier()
    return tl.sum(energy, 0)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "least"])
def adjoint_loop_kernel(
    x_ptr,
    y_ptr,
    norm_x_ptr,
    norm_y_ptr,
    scale_x_ptr,
    scale_y_ptr,
    centre_ptr,
    cu_a_ptr,
    cu_b_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    f_ptr,
    g_ptr,
    w_ptr,
    z_ptr,
    residual_ptr,
    of_rows_ptr,
    of_columns_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    inverse_rho_a,
    inverse_rho_b,
    least,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
    LINES: tl.constexpr,
):
    """For problems of more than ``least`` lines a side; 3 n and 7 m numbers of room for each."""
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if tl.maximum(n, m) <= least:
        return
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK, BLOCK, BLOCK_D, BLOCK, WARPS_N, WARPS_M)
    lines = (log_a_ptr + zero_a, log_b_ptr + zero_b, f_ptr + zero_a, g_ptr + zero_b)
    inverse_ptr = of_rows_ptr + 3 * zero_a
    spent_ptr = inverse_ptr + n
    t_ptr = spent_ptr + n
    diagonal_ptr = of_columns_ptr + 7 * zero_b
    spent_b_ptr = diagonal_ptr + m
    q_ptr = spent_b_ptr + m
    rest_ptr = q_ptr + m
    p_ptr = rest_ptr + m
    x_z_ptr = p_ptr + m
    best_ptr = x_z_ptr + m
    epsilon = tl.load(epsilon_ptr + problem)
    scale = LOG2_E / epsilon
    epsilon = tl.where((epsilon > 0) & (epsilon < INFINITY), epsilon, 1.0).to(tl.float64)
    stiff_a = 1 + epsilon * inverse_rho_a
    stiff_b = 1 + epsilon * inverse_rho_b
    singular = (inverse_rho_a == 0) & (inverse_rho_b == 0)
    sums(costs, lines, t_ptr, inverse_ptr, scale, 1, MASS, HOW, TILE)
    sums(costs, lines, t_ptr, diagonal_ptr, scale, 0, MASS, HOW, TILE)
    sums(costs, lines, t_ptr, spent_ptr, scale, 1, SPENT, HOW, TILE)
    sums(costs, lines, t_ptr, spent_b_ptr, scale, 0, SPENT, HOW, TILE)
    mass = tl.zeros((LINES,), tl.float64)
    for zero in range(0, n, LINES):
        index = zero + tl.arange(0, LINES)
        row_sum = load(inverse_ptr, index, n)
        mass += row_sum
        inverse = reciprocal(row_sum * stiff_a)
        tl.store(inverse_ptr + index, inverse, mask=index < n)
        tl.store(t_ptr + index, load(spent_ptr, index, n) * inverse, mask=index < n)
    mass = tl.sum(mass, 0)
    sums(costs, lines, t_ptr, q_ptr, scale, 0, PRODUCT, HOW, TILE)
    size = tl.zeros((LINES,), tl.float64)
    for zero in range(0, m, LINES):
        index = zero + tl.arange(0, LINES)
        diagonal = load(diagonal_ptr, index, m) * stiff_b
        spent = load(spent_b_ptr, index, m)
        rest = tl.where(diagonal > 0, spent - load(q_ptr, index, m), 0.0)
        size += spent * spent * reciprocal(diagonal)
        tl.store(diagonal_ptr + index, diagonal, mask=index < m)
        tl.store(rest_ptr + index, rest, mask=index < m)
    noise = SOLVED * SOLVED * tl.sum(size, 0)
    start = settle(rest_ptr, diagonal_ptr, m, singular, LINES)
    for zero in range(0, m, LINES):
        index = zero + tl.arange(0, LINES)
        p = load(rest_ptr, index, m) * reciprocal(load(diagonal_ptr, index, m))
        nothing = tl.zeros((LINES,), tl.float64)
        tl.store(p_ptr + index, p, mask=index < m)
        tl.store(x_z_ptr + index, nothing, mask=index < m)
        tl.store(best_ptr + index, nothing, mask=index < m)
    rho = start
    best = start
    stale = 0
    step = 0
    while (rho > noise) & (stale < PATIENCE) & (step < 4 * m + 100):
        sums(costs, lines, p_ptr, t_ptr, scale, 1, PRODUCT, HOW, TILE)
        for zero in range(0, n, LINES):
            index = zero + tl.arange(0, LINES)
            t = load(t_ptr, index, n) * load(inverse_ptr, index, n)
            tl.store(t_ptr + index, t, mask=index < n)
        sums(costs, lines, t_ptr, q_ptr, scale, 0, PRODUCT, HOW, TILE)
        curvature = tl.zeros((LINES,), tl.float64)
        for zero in range(0, m, LINES):
            index = zero + tl.arange(0, LINES)
            p = load(p_ptr, index, m)
            q = load(diagonal_ptr, index, m) * p - load(q_ptr, index, m)
            curvature += p * q
            tl.store(q_ptr + index, q, mask=index < m)
        tl.debug_barrier()
        bent = tl.sum(curvature, 0)
        length = rho / bent
        # Rounding has the last word near the solution: no step along a direction that it decides.
        sound = (bent > 0) & (tl.abs(length) < INFINITY)
        length = tl.where(sound, length, 0.0)
        for zero in range(0, m, LINES):
            index = zero + tl.arange(0, LINES)
            z = load(x_z_ptr, index, m) + length * load(p_ptr, index, m)
            rest = load(rest_ptr, index, m) - length * load(q_ptr, index, m)
            tl.store(x_z_ptr + index, z, mask=index < m)
            tl.store(rest_ptr + index, rest, mask=index < m)
        following = settle(rest_ptr, diagonal_ptr, m, singular, LINES)
        sound = sound & (following < INFINITY)
        stale = tl.where(sound, tl.where(following < best / 2, 0, stale + 1), PATIENCE)
        better = sound & (following < best)
        for zero in range(0, m, LINES):
            index = zero + tl.arange(0, LINES)
            z = tl.where(better, load(x_z_ptr, index, m), load(best_ptr, index, m))
            weight = reciprocal(load(diagonal_ptr, index, m))
            p = load(rest_ptr, index, m) * weight + following / rho * load(p_ptr, index, m)
            tl.store(best_ptr + index, z, mask=index < m)
            tl.store(p_ptr + index, p, mask=index < m)
        best = tl.where(better, following, best)
        rho = following
        step += 1
    sums(costs, lines, best_ptr, t_ptr, scale, 1, PRODUCT, HOW, TILE)
    mean = tl.zeros((LINES,), tl.float64)
    for zero in range(0, n, LINES):
        index = zero + tl.arange(0, LINES)
        inverse = load(inverse_ptr, index, n)
        w = (load(spent_ptr, index, n) - load(t_ptr, index, n)) * inverse
        mean += w * reciprocal(inverse) / stiff_a
        tl.store(t_ptr + index, w, mask=index < n)
    tl.debug_barrier()
    shift = tl.where(singular, tl.sum(mean, 0) * reciprocal(mass), 0.0)
    for zero in range(0, n, LINES):
        index = zero + tl.arange(0, LINES)
        w = tl.where(load(inverse_ptr, index, n) > 0, load(t_ptr, index, n) - shift, 0.0)
        tl.store(w_ptr + zero_a + index, w.to(tl.float32), mask=index < n)
    for zero in range(0, m, LINES):
        index = zero + tl.arange(0, LINES)
        live = load(diagonal_ptr, index, m) > 0
        z = tl.where(live, load(best_ptr, index, m) + shift, 0.0)
        tl.store(z_ptr + zero_b + index, z.to(tl.float32), mask=index < m)
    residual = tl.where(start > noise, tl.sqrt(best * reciprocal(start)), 0.0)
    tl.store(residual_ptr + problem, residual.to(tl.float32))
