"""Linear system behind implicit gradients for streamed problems, one program per problem.

The method is that of ``onchip.adjoint``. The plan is recomputed tile by tile for every product and
vectors live in device memory. Both products read identical tiles, so they are those of one matrix.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    ADJOINT_PATIENCE,
    ADJOINT_TOLERANCE,
    INFINITY,
    LOG2_E,
    cost_tile,
    extent,
    load_log_mass,
    locate_cost,
    plan_tile,
)

# Quantities that ``plan_sums`` sums: P v, P, P * C.
PRODUCT = tl.constexpr(0)
MARGINAL = tl.constexpr(1)
TRANSPORT = tl.constexpr(2)


@triton.jit
def plan_sums(
    costs,
    sides,
    v_ptr,
    sum_ptr,
    scale,
    AXIS: tl.constexpr,
    QUANTITY: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum P v, P or P * C (QUANTITY) along AXIS: 1 for the sum of each row, 0 of each column.

    ``sides``: pointers to the log-masses and potentials of both sides.
    """
    log_a_ptr, log_b_ptr, f_ptr, g_ptr = sides
    x, y, _, _ = costs
    n = x[4]
    m = y[4]
    BLOCK: tl.constexpr = TILE[0]
    tl.debug_barrier()
    out_size = n if AXIS == 1 else m
    sum_size = m if AXIS == 1 else n
    for out_start in range(0, out_size, BLOCK):
        total = tl.zeros((BLOCK,), tl.float64)
        for sum_start in range(0, sum_size, BLOCK):
            row_start = out_start if AXIS == 1 else sum_start
            column_start = sum_start if AXIS == 1 else out_start
            rows = row_start + tl.arange(0, BLOCK)
            columns = column_start + tl.arange(0, BLOCK)
            cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
            A = load_log_mass(log_a_ptr, rows, n)
            B = load_log_mass(log_b_ptr, columns, m)
            f = tl.load(f_ptr + rows, mask=rows < n, other=0.0)
            g = tl.load(g_ptr + columns, mask=columns < m, other=0.0)
            plan = plan_tile(cost, A, B, f, g, scale)
            value = plan.to(tl.float64)
            if QUANTITY == TRANSPORT:
                value *= tl.where(plan > 0, cost, 0.0).to(tl.float64)
            elif QUANTITY == PRODUCT:
                summed = sum_start + tl.arange(0, BLOCK)
                v = tl.load(v_ptr + summed, mask=summed < sum_size, other=0.0)
                value *= tl.expand_dims(v, 1 - AXIS)
            total += tl.sum(value, AXIS)
        index = out_start + tl.arange(0, BLOCK)
        tl.store(sum_ptr + index, total, mask=index < out_size)
    tl.debug_barrier()


@triton.jit
def load_vector(ptr, index, size):
    """Load part of a vector, 0 beyond its end."""
    return tl.load(ptr + index, mask=index < size, other=0.0)


@triton.jit
def reciprocal(x):
    """Compute 1 / x, and 0 for 0."""
    return tl.where(x > 0, 1 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def project_and_norm(r_ptr, diagonal_ptr, m, singular, VECTOR_BLOCK: tl.constexpr):
    """Remove the null vector's component from r; return the squared norm under 1 / diagonal."""
    tl.debug_barrier()
    total = tl.zeros((VECTOR_BLOCK,), tl.float64)
    mass = tl.zeros((VECTOR_BLOCK,), tl.float64)
    for block_start in range(0, m, VECTOR_BLOCK):
        index = block_start + tl.arange(0, VECTOR_BLOCK)
        total += load_vector(r_ptr, index, m)
        mass += load_vector(diagonal_ptr, index, m)
    share = tl.where(singular, tl.sum(total, 0) * reciprocal(tl.sum(mass, 0)), 0.0)
    tl.debug_barrier()
    energy = tl.zeros((VECTOR_BLOCK,), tl.float64)
    for block_start in range(0, m, VECTOR_BLOCK):
        index = block_start + tl.arange(0, VECTOR_BLOCK)
        diagonal = load_vector(diagonal_ptr, index, m)
        r = load_vector(r_ptr, index, m) - share * diagonal
        energy += r * r * reciprocal(diagonal)
        tl.store(r_ptr + index, r, mask=index < m)
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
    row_work_ptr,
    column_work_ptr,
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
    VECTOR_BLOCK: tl.constexpr,
):
    """Solve the system of each problem with more than ``least`` rows or columns.

    Workspace per problem: 3 n float64 numbers in ``row_work_ptr`` and 7 m in ``column_work_ptr``.
    """
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if tl.maximum(n, m) <= least:
        return
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK, BLOCK, BLOCK_D, BLOCK, WARPS_N, WARPS_M)
    sides = (log_a_ptr + offset_a, log_b_ptr + offset_b, f_ptr + offset_a, g_ptr + offset_b)
    inverse_ptr = row_work_ptr + 3 * offset_a
    cost_sum_a_ptr = inverse_ptr + n
    t_ptr = cost_sum_a_ptr + n
    diagonal_ptr = column_work_ptr + 7 * offset_b
    cost_sum_b_ptr = diagonal_ptr + m
    q_ptr = cost_sum_b_ptr + m
    r_ptr = q_ptr + m
    p_ptr = r_ptr + m
    z_work_ptr = p_ptr + m
    best_ptr = z_work_ptr + m
    epsilon = tl.load(epsilon_ptr + problem)
    scale = LOG2_E / epsilon
    epsilon = tl.where((epsilon > 0) & (epsilon < INFINITY), epsilon, 1.0).to(tl.float64)
    row_factor = 1 + epsilon * inverse_rho_a
    column_factor = 1 + epsilon * inverse_rho_b
    singular = (inverse_rho_a == 0) & (inverse_rho_b == 0)
    plan_sums(costs, sides, t_ptr, inverse_ptr, scale, 1, MARGINAL, SPEC, TILE)
    plan_sums(costs, sides, t_ptr, diagonal_ptr, scale, 0, MARGINAL, SPEC, TILE)
    plan_sums(costs, sides, t_ptr, cost_sum_a_ptr, scale, 1, TRANSPORT, SPEC, TILE)
    plan_sums(costs, sides, t_ptr, cost_sum_b_ptr, scale, 0, TRANSPORT, SPEC, TILE)
    mass = tl.zeros((VECTOR_BLOCK,), tl.float64)
    for block_start in range(0, n, VECTOR_BLOCK):
        index = block_start + tl.arange(0, VECTOR_BLOCK)
        row_sum = load_vector(inverse_ptr, index, n)
        mass += row_sum
        inverse = reciprocal(row_sum * row_factor)
        tl.store(inverse_ptr + index, inverse, mask=index < n)
        tl.store(t_ptr + index, load_vector(cost_sum_a_ptr, index, n) * inverse, mask=index < n)
    mass = tl.sum(mass, 0)
    plan_sums(costs, sides, t_ptr, q_ptr, scale, 0, PRODUCT, SPEC, TILE)
    norm = tl.zeros((VECTOR_BLOCK,), tl.float64)
    for block_start in range(0, m, VECTOR_BLOCK):
        index = block_start + tl.arange(0, VECTOR_BLOCK)
        diagonal = load_vector(diagonal_ptr, index, m) * column_factor
        cost_sum = load_vector(cost_sum_b_ptr, index, m)
        r = tl.where(diagonal > 0, cost_sum - load_vector(q_ptr, index, m), 0.0)
        norm += cost_sum * cost_sum * reciprocal(diagonal)
        tl.store(diagonal_ptr + index, diagonal, mask=index < m)
        tl.store(r_ptr + index, r, mask=index < m)
    tolerance = ADJOINT_TOLERANCE * ADJOINT_TOLERANCE * tl.sum(norm, 0)
    initial = project_and_norm(r_ptr, diagonal_ptr, m, singular, VECTOR_BLOCK)
    for block_start in range(0, m, VECTOR_BLOCK):
        index = block_start + tl.arange(0, VECTOR_BLOCK)
        p = load_vector(r_ptr, index, m) * reciprocal(load_vector(diagonal_ptr, index, m))
        zeros = tl.zeros((VECTOR_BLOCK,), tl.float64)
        tl.store(p_ptr + index, p, mask=index < m)
        tl.store(z_work_ptr + index, zeros, mask=index < m)
        tl.store(best_ptr + index, zeros, mask=index < m)
    r_norm = initial
    best = initial
    stalled = 0
    step = 0
    while (r_norm > tolerance) & (stalled < ADJOINT_PATIENCE) & (step < 4 * m + 100):
        plan_sums(costs, sides, p_ptr, t_ptr, scale, 1, PRODUCT, SPEC, TILE)
        for block_start in range(0, n, VECTOR_BLOCK):
            index = block_start + tl.arange(0, VECTOR_BLOCK)
            t = load_vector(t_ptr, index, n) * load_vector(inverse_ptr, index, n)
            tl.store(t_ptr + index, t, mask=index < n)
        plan_sums(costs, sides, t_ptr, q_ptr, scale, 0, PRODUCT, SPEC, TILE)
        pq = tl.zeros((VECTOR_BLOCK,), tl.float64)
        for block_start in range(0, m, VECTOR_BLOCK):
            index = block_start + tl.arange(0, VECTOR_BLOCK)
            p = load_vector(p_ptr, index, m)
            q = load_vector(diagonal_ptr, index, m) * p - load_vector(q_ptr, index, m)
            pq += p * q
            tl.store(q_ptr + index, q, mask=index < m)
        tl.debug_barrier()
        curvature = tl.sum(pq, 0)
        alpha = r_norm / curvature
        # Near the solution rounding errors may spoil the direction; then no step is taken.
        usable = (curvature > 0) & (tl.abs(alpha) < INFINITY)
        alpha = tl.where(usable, alpha, 0.0)
        for block_start in range(0, m, VECTOR_BLOCK):
            index = block_start + tl.arange(0, VECTOR_BLOCK)
            z = load_vector(z_work_ptr, index, m) + alpha * load_vector(p_ptr, index, m)
            r = load_vector(r_ptr, index, m) - alpha * load_vector(q_ptr, index, m)
            tl.store(z_work_ptr + index, z, mask=index < m)
            tl.store(r_ptr + index, r, mask=index < m)
        next_norm = project_and_norm(r_ptr, diagonal_ptr, m, singular, VECTOR_BLOCK)
        usable = usable & (next_norm < INFINITY)
        stalled = tl.where(usable, tl.where(next_norm < best / 2, 0, stalled + 1), ADJOINT_PATIENCE)
        improved = usable & (next_norm < best)
        for block_start in range(0, m, VECTOR_BLOCK):
            index = block_start + tl.arange(0, VECTOR_BLOCK)
            z = tl.where(
                improved, load_vector(z_work_ptr, index, m), load_vector(best_ptr, index, m)
            )
            weight = reciprocal(load_vector(diagonal_ptr, index, m))
            p = load_vector(r_ptr, index, m) * weight + next_norm / r_norm * load_vector(
                p_ptr, index, m
            )
            tl.store(best_ptr + index, z, mask=index < m)
            tl.store(p_ptr + index, p, mask=index < m)
        best = tl.where(improved, next_norm, best)
        r_norm = next_norm
        step += 1
    plan_sums(costs, sides, best_ptr, t_ptr, scale, 1, PRODUCT, SPEC, TILE)
    mean = tl.zeros((VECTOR_BLOCK,), tl.float64)
    for block_start in range(0, n, VECTOR_BLOCK):
        index = block_start + tl.arange(0, VECTOR_BLOCK)
        inverse = load_vector(inverse_ptr, index, n)
        w = (load_vector(cost_sum_a_ptr, index, n) - load_vector(t_ptr, index, n)) * inverse
        mean += w * reciprocal(inverse) / row_factor
        tl.store(t_ptr + index, w, mask=index < n)
    tl.debug_barrier()
    shift = tl.where(singular, tl.sum(mean, 0) * reciprocal(mass), 0.0)
    for block_start in range(0, n, VECTOR_BLOCK):
        index = block_start + tl.arange(0, VECTOR_BLOCK)
        w = tl.where(
            load_vector(inverse_ptr, index, n) > 0, load_vector(t_ptr, index, n) - shift, 0.0
        )
        tl.store(w_ptr + offset_a + index, w.to(tl.float32), mask=index < n)
    for block_start in range(0, m, VECTOR_BLOCK):
        index = block_start + tl.arange(0, VECTOR_BLOCK)
        positive = load_vector(diagonal_ptr, index, m) > 0
        z = tl.where(positive, load_vector(best_ptr, index, m) + shift, 0.0)
        tl.store(z_ptr + offset_b + index, z.to(tl.float32), mask=index < m)
    residual = tl.where(initial > tolerance, tl.sqrt(best * reciprocal(initial)), 0.0)
    tl.store(residual_ptr + problem, residual.to(tl.float32))
