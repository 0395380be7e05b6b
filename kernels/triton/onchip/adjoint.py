"""Linear system behind implicit gradients, one program per problem, with its plan in registers.

    [[diag(r'), P], [P', diag(c')]] [w; z] = [(P * C) 1; (P * C)' 1]

r' and c' are the row and column sums of P times 1 + epsilon / rho of their side. w is eliminated
and z is found by conjugate gradients, preconditioned by c'. With both marginals fixed, (1, -1)
spans the null space: residuals are kept orthogonal to it, and w is shifted to mean 0 under the
row sums. Near the solution rounding errors determine the search direction, so the best z so far
is kept, and the search stops once it no longer halves its residual.

The plan is float32 and everything else float64. A rounded plan still determines the solution,
because the system is built from its sums; rounded sums do not.
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


@triton.jit
def plan_times(plan, v, axis: tl.constexpr):
    """Multiply the plan (axis 1), or its transpose (axis 0), with a vector in float64."""
    return tl.sum(plan.to(tl.float64) * tl.expand_dims(v, 1 - axis), axis)


@triton.jit
def weighted_norm(x, diagonal):
    """Compute the squared norm of x under the inverse diagonal."""
    positive = diagonal > 0
    return tl.sum(tl.where(positive, x * x / tl.where(positive, diagonal, 1.0), 0.0), 0)


@triton.jit
def project_out_null(x, diagonal, singular):
    """Remove the component of x along the null vector."""
    mass = tl.sum(diagonal, 0)
    share = tl.where(singular & (mass > 0), tl.sum(x, 0) / tl.where(mass > 0, mass, 1.0), 0.0)
    return x - share * diagonal


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "least", "most"])
def adjoint_kernel(
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
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    inverse_rho_a,
    inverse_rho_b,
    least,
    most,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    """Solve the system of one problem; store w, z and the relative residual."""
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if PACKED:
        longest = tl.maximum(n, m)
        if (longest < least) | (longest > most):
            return
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    epsilon = tl.load(epsilon_ptr + problem)
    A = load_log_mass(log_a_ptr + offset_a, rows, n)
    B = load_log_mass(log_b_ptr + offset_b, columns, m)
    f = tl.load(f_ptr + offset_a + rows, mask=rows < n, other=0.0)
    g = tl.load(g_ptr + offset_b + columns, mask=columns < m, other=0.0)
    cost = cost_tile(costs, 0, 0, SPEC, (BLOCK_N, BLOCK_M, BLOCK_D, PART, WARPS_N, WARPS_M))
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    cost = tl.where(plan > 0, cost, 0.0)
    cost_sum_a = tl.sum(plan.to(tl.float64) * cost.to(tl.float64), 1)
    cost_sum_b = tl.sum(plan.to(tl.float64) * cost.to(tl.float64), 0)
    row_sum = tl.sum(plan.to(tl.float64), 1)
    epsilon = tl.where((epsilon > 0) & (epsilon < INFINITY), epsilon, 1.0).to(tl.float64)
    row_diagonal = row_sum * (1 + epsilon * inverse_rho_a)
    inverse = tl.where(row_diagonal > 0, 1 / tl.where(row_diagonal > 0, row_diagonal, 1.0), 0.0)
    diagonal = tl.sum(plan.to(tl.float64), 0) * (1 + epsilon * inverse_rho_b)
    positive = diagonal > 0
    preconditioner = tl.where(positive, 1 / tl.where(positive, diagonal, 1.0), 0.0)
    singular = (inverse_rho_a == 0) & (inverse_rho_b == 0)

    z = tl.zeros((BLOCK_M,), tl.float64)
    best_z = z
    r = tl.where(positive, cost_sum_b - plan_times(plan, cost_sum_a * inverse, 0), 0.0)
    r = project_out_null(r, diagonal, singular)
    initial = weighted_norm(r, diagonal)
    tolerance = ADJOINT_TOLERANCE * ADJOINT_TOLERANCE * weighted_norm(cost_sum_b, diagonal)
    r_norm = initial
    best = initial
    p = r * preconditioner
    stalled = 0
    step = 0
    while (r_norm > tolerance) & (stalled < ADJOINT_PATIENCE) & (step < 4 * m + 100):
        # A plan that appears to change is not held in float64 across iterations.
        plan_again = plan * (1.0 + tl.minimum(step, 0))
        q = diagonal * p - plan_times(plan_again, plan_times(plan_again, p, 1) * inverse, 0)
        curvature = tl.sum(p * q, 0)
        alpha = r_norm / curvature
        # Near the solution rounding errors may spoil the direction; then no step is taken.
        usable = (curvature > 0) & (tl.abs(alpha) < INFINITY)
        z += tl.where(usable, alpha, 0.0) * p
        r = project_out_null(r - tl.where(usable, alpha, 0.0) * q, diagonal, singular)
        next_norm = weighted_norm(r, diagonal)
        usable = usable & (next_norm < INFINITY)
        stalled = tl.where(usable, tl.where(next_norm < best / 2, 0, stalled + 1), ADJOINT_PATIENCE)
        improved = usable & (next_norm < best)
        best_z = tl.where(improved, z, best_z)
        best = tl.where(improved, next_norm, best)
        p = r * preconditioner + next_norm / r_norm * p
        r_norm = next_norm
        step += 1
    w = (cost_sum_a - plan_times(plan, best_z, 1)) * inverse
    mass = tl.sum(row_sum, 0)
    shift = tl.sum(row_sum * w, 0) / tl.where(mass > 0, mass, 1.0)
    shift = tl.where(singular, shift, 0.0)
    w = tl.where(row_sum > 0, w - shift, 0.0)
    z = tl.where(positive, best_z + shift, 0.0)
    residual = tl.where(
        initial > tolerance, tl.sqrt(best / tl.where(initial > 0, initial, 1.0)), 0.0
    )
    tl.store(w_ptr + offset_a + rows, w.to(tl.float32), mask=rows < n)
    tl.store(z_ptr + offset_b + columns, z.to(tl.float32), mask=columns < m)
    tl.store(residual_ptr + problem, residual.to(tl.float32))
