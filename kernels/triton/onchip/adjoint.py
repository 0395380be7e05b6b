"""The linear system behind implicit gradients, one program per problem, its plan in registers.

    [[diag(r'), P], [P', diag(c')]] [w; z] = [(P * C) 1; (P * C)' 1]

with r' and c' the row and column sums of P times 1 + epsilon / rho of their side. w is eliminated
and z found by conjugate gradients, preconditioned by c'. With both marginals fixed (1, -1) solves
the homogeneous system: residuals are kept orthogonal to it, and in the end w gets mean 0 under the
row sums. Near the solution rounding decides the direction, so the best z so far is kept, and a
search that stops to halve its residual is given up.

The plan is float32 and everything else float64: a rounded plan still determines the solution, for
the system consists of its sums, but rounded sums do not.
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


@triton.jit
def times(plan, v, axis: tl.constexpr):
    """The plan, or with axis 0 its transpose, times a vector, in float64."""
    return tl.sum(plan.to(tl.float64) * tl.expand_dims(v, 1 - axis), axis)


@triton.jit
def energy(x, diagonal):
    live = diagonal > 0
    return tl.sum(tl.where(live, x * x / tl.where(live, diagonal, 1.0), 0.0), 0)


@triton.jit
def orthogonal(x, diagonal, singular):
    """x without its part along the null vector."""
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
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if PACKED:
        longest = tl.maximum(n, m)
        if (longest < least) | (longest > most):
            return
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    epsilon = tl.load(epsilon_ptr + problem)
    A = load_log_mass(log_a_ptr + zero_a, rows, n)
    B = load_log_mass(log_b_ptr + zero_b, columns, m)
    f = tl.load(f_ptr + zero_a + rows, mask=rows < n, other=0.0)
    g = tl.load(g_ptr + zero_b + columns, mask=columns < m, other=0.0)
    cost = cost_tile(costs, 0, 0, HOW, (BLOCK_N, BLOCK_M, BLOCK_D, PART, WARPS_N, WARPS_M))
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    cost = tl.where(plan > 0, cost, 0.0)
    spent = tl.sum(plan.to(tl.float64) * cost.to(tl.float64), 1)
    spent_b = tl.sum(plan.to(tl.float64) * cost.to(tl.float64), 0)
    row_sum = tl.sum(plan.to(tl.float64), 1)
    epsilon = tl.where((epsilon > 0) & (epsilon < INFINITY), epsilon, 1.0).to(tl.float64)
    stiff = row_sum * (1 + epsilon * inverse_rho_a)
    inverse = tl.where(stiff > 0, 1 / tl.where(stiff > 0, stiff, 1.0), 0.0)
    diagonal = tl.sum(plan.to(tl.float64), 0) * (1 + epsilon * inverse_rho_b)
    live = diagonal > 0
    weight = tl.where(live, 1 / tl.where(live, diagonal, 1.0), 0.0)
    singular = (inverse_rho_a == 0) & (inverse_rho_b == 0)

    z = tl.zeros((BLOCK_M,), tl.float64)
    best_z = z
    rest = tl.where(live, spent_b - times(plan, spent * inverse, 0), 0.0)
    rest = orthogonal(rest, diagonal, singular)
    start = energy(rest, diagonal)
    noise = SOLVED * SOLVED * energy(spent_b, diagonal)
    rho = start
    best = start
    p = rest * weight
    stale = 0
    step = 0
    while (rho > noise) & (stale < PATIENCE) & (step < 4 * m + 100):
        # A plan that seems to change is not kept in float64 all the time.
        same = plan * (1.0 + tl.minimum(step, 0))
        q = diagonal * p - times(same, times(same, p, 1) * inverse, 0)
        curvature = tl.sum(p * q, 0)
        length = rho / curvature
        # Rounding has the last word near the solution: no step along a direction that it decides.
        sound = (curvature > 0) & (tl.abs(length) < INFINITY)
        z += tl.where(sound, length, 0.0) * p
        rest = orthogonal(rest - tl.where(sound, length, 0.0) * q, diagonal, singular)
        following = energy(rest, diagonal)
        sound = sound & (following < INFINITY)
        stale = tl.where(sound, tl.where(following < best / 2, 0, stale + 1), PATIENCE)
        better = sound & (following < best)
        best_z = tl.where(better, z, best_z)
        best = tl.where(better, following, best)
        p = rest * weight + following / rho * p
        rho = following
        step += 1
    w = (spent - times(plan, best_z, 1)) * inverse
    mass = tl.sum(row_sum, 0)
    shift = tl.sum(row_sum * w, 0) / tl.where(mass > 0, mass, 1.0)
    shift = tl.where(singular, shift, 0.0)
    w = tl.where(row_sum > 0, w - shift, 0.0)
    z = tl.where(live, best_z + shift, 0.0)
    residual = tl.where(start > noise, tl.sqrt(best / tl.where(start > 0, start, 1.0)), 0.0)
    tl.store(w_ptr + zero_a + rows, w.to(tl.float32), mask=rows < n)
    tl.store(z_ptr + zero_b + columns, z.to(tl.float32), mask=columns < m)
    tl.store(residual_ptr + problem, residual.to(tl.float32))
