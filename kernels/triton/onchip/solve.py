"""Batched Sinkhorn solver, one program per problem, with the whole plan in registers.

    plan_ij = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)

Logarithms are binary and potentials are in units of epsilon / log2(e): F and G, S = C in the same
units, A = log2 a and B = log2 b.

An *exact* iteration is the pair of log-sum-exps of the definition, one exp2 per entry and
half-step. It leaves K = exp2(F + G - S + A + B). A *scaling* iteration then computes the same
iterates by multiplications alone (Schmitzer, arXiv 1610.06519, section 3):

    u_i = a_i / sum_j K_ij v_j,    v_j = b_j / sum_i u_i K_ij,    F + log2 u, G + log2 v

An exact iteration rebuilds K when a scaling has drifted past 2^+-30, and while the temperature
falls. With fixed marginals no exponent exceeds A or B after an exact iteration, so nothing
overflows. If a scaling still leaves 2^+-50, its iterations are discarded and repeated exactly.

Registers: K (n x m) and a few vectors. Memory traffic: vectors or cost are read once, and once
more each time K is rebuilt.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    EMPTY,
    INFINITY,
    LOG2_E,
    MASS_TOLERANCE,
    cost_tile,
    extent,
    final_status,
    kl_penalty,
    load_log_mass,
    locate_cost,
    log_sum_exp2,
    overflows,
    quotient,
    step_factor,
    swap_sides,
    target_marginal,
    times_log2,
)

# Scaling beyond which the next iteration is exact and rebuilds K, and beyond which the scaling
# iterations since the last exact one are discarded.
REBUILD_LIMIT = tl.constexpr(2.0**30)
DISCARD_LIMIT = tl.constexpr(2.0**50)
# Smallest mass and sum of a row or column with which K may be scaled, lower bound of a product with
# K, and the largest sum with which K may be scaled under penalties or over-relaxation.
MIN_MASS = tl.constexpr(2.0**-40)
MIN_SUM = tl.constexpr(2.0**-120)
MAX_SUM = tl.constexpr(2.0**100)


@triton.jit
def load_start(start_ptr, index, log_mass, size):
    """Load the initial potentials, and whether one of a valid row or column is not finite."""
    mask = (index < size) & (log_mass != -INFINITY)
    start = tl.load(start_ptr + index, mask=mask, other=0.0)
    return start, tl.max((tl.abs(start) < INFINITY).to(tl.int32) ^ 1, 0) > 0


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "max_iter", "least", "most"])
def resident_kernel(
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
    f0_ptr,
    g0_ptr,
    f_ptr,
    g_ptr,
    value_ptr,
    value_linear_ptr,
    marginal_error_ptr,
    n_iter_ptr,
    status_ptr,
    residual_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    max_iter,
    tol,
    inverse_rho_a,
    inverse_rho_b,
    omega,
    anneal_start,
    anneal_ratio,
    least,
    most,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    START: tl.constexpr,
    GENERAL: tl.constexpr,
    ANNEAL: tl.constexpr,
    STEPS: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    NVIDIA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    """Run all iterations of one problem and write its outputs."""
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if PACKED:
        # Every tile size is launched with the same grid; each problem belongs to one of them.
        longest = tl.maximum(n, m)
        if (longest < least) | (longest > most):
            return
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    log_a_ptr += offset_a
    log_b_ptr += offset_b
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    epsilon = tl.load(epsilon_ptr + problem)
    valid_epsilon = (epsilon > 0) & (epsilon < INFINITY)
    epsilon = tl.where(valid_epsilon, epsilon, 1.0)
    scale = LOG2_E / epsilon
    strength_a = epsilon * inverse_rho_a
    strength_b = epsilon * inverse_rho_b

    A = load_log_mass(log_a_ptr, rows, n)
    B = load_log_mass(log_b_ptr, columns, m)
    empty = (tl.max((A != -INFINITY).to(tl.int32), 0) == 0) | (
        tl.max((B != -INFINITY).to(tl.int32), 0) == 0
    )
    not_finite = tl.max((A < INFINITY).to(tl.int32) ^ 1, 0) > 0
    not_finite = not_finite | (tl.max((B < INFINITY).to(tl.int32) ^ 1, 0) > 0)
    invalid = (valid_epsilon == 0) | not_finite
    # Potentials live in device memory during scaling iterations: K needs the registers.
    f_ptr += offset_a
    g_ptr += offset_b
    F = tl.zeros((BLOCK_N,), tl.float32)
    G = tl.zeros((BLOCK_M,), tl.float32)
    if START:
        F, not_finite = load_start(f0_ptr + offset_a, rows, A, n)
        invalid = invalid | not_finite
        G, not_finite = load_start(g0_ptr + offset_b, columns, B, m)
        invalid = invalid | not_finite
    tl.store(f_ptr + rows, F * scale, mask=rows < n)
    tl.store(g_ptr + columns, G * scale, mask=columns < m)
    u = tl.zeros((BLOCK_N,), tl.float32) + 1.0
    v = tl.zeros((BLOCK_M,), tl.float32) + 1.0
    K = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    isolated_a = False
    isolated_b = False
    iteration = 0
    stop = False
    # Over-relaxation leaves the columns inexact, too: their error at the current iterate, and at
    # the one at which K was computed.
    column_error = 0.0
    rebuilt_column_error = 0.0
    at_epsilon = False
    running = True
    annealing = anneal_start
    exact_until = 0
    while running:
        # An offset that appears to depend on the loop keeps addresses out of registers between
        # rebuilds.
        loop_zero = tl.multiple_of(tl.minimum(iteration, 0), 16)
        temperature = epsilon
        if ANNEAL:
            temperature = tl.maximum(epsilon, annealing)
            annealing *= anneal_ratio
        if GENERAL:
            relaxation = tl.where((iteration == 0) | (temperature != epsilon), 1.0, omega)
            beta_a = step_factor(relaxation, temperature, inverse_rho_a)
            beta_b = step_factor(relaxation, temperature, inverse_rho_b)
        A = load_log_mass(log_a_ptr, rows + loop_zero, n)
        B = load_log_mass(log_b_ptr, columns + loop_zero, m)
        if BLOCK_N > BLOCK_M:
            # A tall tile is computed transposed, so that its sums cost no more than a wide one's.
            TRANSPOSED_TILE: tl.constexpr = (BLOCK_M, BLOCK_N, BLOCK_D, PART, WARPS_M, WARPS_N)
            cost = tl.trans(
                cost_tile(swap_sides(costs), loop_zero, loop_zero, SPEC, TRANSPOSED_TILE)
            )
        else:
            TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, PART, WARPS_N, WARPS_M)
            cost = cost_tile(costs, loop_zero, loop_zero, SPEC, TILE)
        # T holds -S, then the scores of the rows (with G and B), then log2 of the plan (with F
        # and A).
        valid = (A != -INFINITY)[:, None] & (B != -INFINITY)[None, :]
        T = tl.where(valid, -scale * cost, -INFINITY)
        # Comparisons with NaN are false; a cost of -inf is invalid as well.
        finite_pairs = tl.min(tl.where(T < INFINITY, 1, 0), 1)
        invalid = invalid | (tl.min(finite_pairs, 0) == 0)
        ratio = 1.0
        if ANNEAL:
            ratio = epsilon / temperature
            T = T * ratio
        tl.debug_barrier()
        G = tl.load(g_ptr + columns + loop_zero, mask=columns < m, other=0.0)
        G += tl.where(v > 0, tl.log2(v), 0.0)
        T += (B + G * ratio)[None, :]
        softmin, row_has_pair = log_sum_exp2(T, 1)
        softmin = -softmin / ratio
        isolated_a = tl.max(tl.where(row_has_pair, 0, tl.where(A != -INFINITY, 1, 0)), 0) > 0
        F = tl.load(f_ptr + rows + loop_zero, mask=rows < n, other=0.0)
        F = tl.where(row_has_pair, F + tl.where(u > 0, tl.log2(u), 0.0), 0.0)
        row_sum = tl.where(row_has_pair, tl.exp2(A + (F - softmin) * ratio), 0.0)
        error = tl.sum(tl.abs(row_sum - target_marginal(A, row_has_pair, F, strength_a)), 0)
        stop = at_epsilon & (tol > 0) & (error + column_error <= tol)
        at_epsilon = temperature == epsilon
        halt = stop | empty | invalid | (iteration >= max_iter)
        F_next = softmin
        if GENERAL:
            F_next = (1 - relaxation) * F + beta_a * softmin
        F = tl.where(halt, F, F_next)
        T += (A + F * ratio)[:, None]
        total, column_has_pair = log_sum_exp2(T, 0)
        isolated_b = tl.max(tl.where(column_has_pair, 0, tl.where(B != -INFINITY, 1, 0)), 0) > 0
        softmin = tl.where(column_has_pair, G + (B - total) / ratio, 0.0)
        G_next = softmin
        if GENERAL:
            G_next = (1 - relaxation) * G + beta_b * softmin
        G_next = tl.where(halt, G, G_next)
        G_next = tl.where(column_has_pair, G_next, 0.0)
        if GENERAL and (tol > 0) & (omega != 1):
            excess = tl.where(column_has_pair, tl.exp2(B + (G_next - softmin) * ratio), 0.0)
            excess -= target_marginal(B, column_has_pair, G_next, strength_b)
            column_error = tl.sum(tl.abs(excess), 0)
            rebuilt_column_error = column_error
        if ANNEAL:
            # log2 of the plan at the final temperature: S = (A + B + (F + G) ratio - T) / ratio.
            T = tl.where(T > -INFINITY, T - (A + F * ratio)[:, None], -INFINITY)
            T = tl.where(T > -INFINITY, (T - (B + G * ratio)[None, :]) / ratio, -INFINITY)
            K = tl.exp2(T + (A + F)[:, None] + (B + G_next)[None, :])
        else:
            K = tl.exp2(T + tl.where(column_has_pair, G_next - G, 0.0)[None, :])
        u = tl.full((BLOCK_N,), 1.0, tl.float32)
        v = tl.full((BLOCK_M,), 1.0, tl.float32)
        if GENERAL:
            # From here on the scaling is 0 exactly for rows and columns without an allowed pair.
            u = tl.where(row_has_pair, u, 0.0)
            v = tl.where(column_has_pair, v, 0.0)
        tl.debug_barrier()
        tl.store(f_ptr + rows + loop_zero, F, mask=rows < n)
        tl.store(g_ptr + columns + loop_zero, G_next, mask=columns < m)
        if GENERAL:
            # The scaling loop reads F from memory.
            tl.debug_barrier()
        # Exact iterations are needed where a row or column of K underflows although it has an
        # allowed pair, or has so little mass that a scaling within 2^+-30 could underflow.
        smallest_sum = tl.min(tl.where(row_has_pair, tl.minimum(tl.sum(K, 1), tl.exp2(A)), 1.0), 0)
        smallest_column_sum = tl.min(
            tl.where(column_has_pair, tl.minimum(tl.sum(K, 0), tl.exp2(B)), 1.0), 0
        )
        iteration += tl.where(halt, 0, 1)
        running = (halt == 0) & (iteration < max_iter)
        scaling = running & at_epsilon & (tl.minimum(smallest_sum, smallest_column_sum) > MIN_MASS)
        scaling = scaling & (iteration >= exact_until)
        if GENERAL:
            largest_sum = tl.maximum(tl.max(tl.sum(K, 1), 0), tl.max(tl.sum(K, 0), 0))
            scaling = scaling & (largest_sum < MAX_SUM)
        rebuilt_at = iteration
        # Numerators of the scalings: the masses, or with penalties or relaxation their logarithms.
        if GENERAL:
            beta_a = step_factor(omega, epsilon, inverse_rho_a)
            beta_b = step_factor(omega, epsilon, inverse_rho_b)
            a = tl.where(row_has_pair, beta_a * A + (beta_a - omega) * F, -INFINITY)
            b = tl.where(column_has_pair, beta_b * B + (beta_b - omega) * G_next, -INFINITY)
        else:
            a = tl.where(row_has_pair, tl.exp2(A), 0.0)
            b = tl.where(column_has_pair, tl.exp2(B), 0.0)
        while scaling:
            # Checking the scalings synchronises the program, so it is done every few iterations.
            steps = 1
            if STEPS > 1:
                steps = tl.minimum(STEPS, max_iter - iteration)
            for _ in range(steps):
                # Only rows and columns without an allowed pair sum to 0; their scaling becomes 0.
                Kv = tl.maximum(tl.sum(K * v[None, :], 1), MIN_SUM)
                if STEPS == 1:
                    # The error is that of the row sums u * Kv before this half-step.
                    log_mass = load_log_mass(log_a_ptr, rows, n)
                    if GENERAL:
                        F = tl.load(f_ptr + rows, mask=rows < n, other=0.0) + tl.log2(u)
                        target = target_marginal(log_mass, u > 0, F, strength_a)
                    else:
                        target = tl.exp2(log_mass)
                    error = tl.sum(tl.abs(u * Kv - target), 0) + column_error
                    stop = (tol > 0) & (error <= tol)
                if GENERAL:
                    start = tl.where(u > 0, (1 - omega) * tl.log2(u), 0.0)
                    u_next = tl.exp2(start + a - beta_a * tl.log2(Kv))
                else:
                    u_next = quotient(a, Kv, NVIDIA)
                Ku = tl.maximum(tl.sum(K * u_next[:, None], 0), MIN_SUM)
                if GENERAL:
                    start = tl.where(v > 0, (1 - omega) * tl.log2(v), 0.0)
                    v_next = tl.exp2(start + b - beta_b * tl.log2(Ku))
                else:
                    v_next = quotient(b, Ku, NVIDIA)
                if GENERAL and (tol > 0) & (omega != 1):
                    log_b = load_log_mass(log_b_ptr, columns, m)
                    g = tl.load(g_ptr + columns, mask=columns < m, other=0.0) + tl.log2(v_next)
                    excess_b = v_next * Ku - target_marginal(log_b, v_next > 0, g, strength_b)
                    column_error = tl.sum(tl.abs(excess_b), 0)
                if STEPS == 1:
                    u = tl.where(stop, u, u_next)
                    v = tl.where(stop, v, v_next)
                else:
                    u = u_next
                    v = v_next
            iteration += tl.where(stop, 0, steps)
            running = (iteration < max_iter) & (stop == 0)
            largest = tl.maximum(tl.max(u, 0), tl.max(v, 0))
            smallest = tl.min(tl.where(u > 0, u, 1.0), 0)
            smallest = tl.minimum(smallest, tl.min(tl.where(v > 0, v, 1.0), 0))
            scaling = running & (largest < REBUILD_LIMIT) & (smallest > 1 / REBUILD_LIMIT)
            if (largest > DISCARD_LIMIT) | (smallest < 1 / DISCARD_LIMIT) | (largest != largest):
                # Digits may be lost: return to the iterate of K and repeat with exact iterations.
                exact_until = iteration
                iteration = rebuilt_at
                column_error = rebuilt_column_error
                stop = False
                running = True
                scaling = False
                u = tl.full((BLOCK_N,), 1.0, tl.float32)
                v = tl.full((BLOCK_M,), 1.0, tl.float32)

    tl.debug_barrier()
    F = tl.load(f_ptr + rows, mask=rows < n, other=0.0) + tl.where(u > 0, tl.log2(u), 0.0)
    G = tl.load(g_ptr + columns, mask=columns < m, other=0.0) + tl.where(v > 0, tl.log2(v), 0.0)
    tl.debug_barrier()
    tl.store(f_ptr + rows, F, mask=rows < n)
    tl.store(g_ptr + columns, G, mask=columns < m)
    # S = A + B + F + G - log2 K, so the cost is not read again.
    K = K * u[:, None] * v[None, :]
    transported = -tl.sum(tl.sum(times_log2(K, NVIDIA), 1), 0)
    row_sum = tl.sum(K, 1)
    column_sum = tl.sum(K, 0)
    tl.debug_barrier()
    A = load_log_mass(log_a_ptr, rows, n)
    B = load_log_mass(log_b_ptr, columns, m)
    F = tl.load(f_ptr + rows, mask=rows < n, other=0.0)
    G = tl.load(g_ptr + columns, mask=columns < m, other=0.0)
    transported += tl.sum(tl.where(row_sum > 0, row_sum * (A + F), 0.0), 0)
    transported += tl.sum(tl.where(column_sum > 0, column_sum * (B + G), 0.0), 0)
    a = tl.exp2(A)
    b = tl.exp2(B)
    total = tl.sum(row_sum, 0)
    mass_a = tl.sum(a, 0)
    mass_b = tl.sum(b, 0)
    dual = tl.sum(row_sum * F, 0) + tl.sum(column_sum * G, 0)
    value = dual / scale + epsilon * (mass_a * mass_b - total)
    target_a = a
    target_b = b
    if GENERAL:
        target_a = target_marginal(A, u > 0, F, strength_a)
        target_b = target_marginal(B, v > 0, G, strength_b)
        if inverse_rho_a > 0:
            value += tl.sum(kl_penalty(row_sum, A, a), 0) / inverse_rho_a
        if inverse_rho_b > 0:
            value += tl.sum(kl_penalty(column_sum, B, b), 0) / inverse_rho_b
    error = tl.sum(tl.abs(row_sum - target_a), 0) + tl.sum(tl.abs(column_sum - target_b), 0)
    fixed_a = inverse_rho_a == 0
    fixed_b = inverse_rho_b == 0
    unbalanced = tl.abs(mass_a - mass_b) > tl.maximum(mass_a, mass_b) * MASS_TOLERANCE
    infeasible = (fixed_a & isolated_a) | (fixed_b & isolated_b) | (fixed_a & fixed_b & unbalanced)
    invalid = invalid & (empty == 0)
    transported /= scale
    F = tl.where(A == -INFINITY, 0.0, F / scale)
    G = tl.where(B == -INFINITY, 0.0, G / scale)
    diverged = tl.max(tl.where(tl.abs(F) < INFINITY, 0, 1), 0) > 0
    diverged = diverged | (tl.max(tl.where(tl.abs(G) < INFINITY, 0, 1), 0) > 0)
    diverged = diverged | overflows(value, transported, error)
    status = final_status(error, tol, invalid | infeasible | diverged)
    status = tl.where(empty, EMPTY, status)
    iteration = tl.where(empty, 0, tl.where(invalid, max_iter, tl.minimum(iteration, max_iter)))
    tl.store(value_ptr + problem, tl.where(empty, 0.0, tl.where(invalid, float("nan"), value)))
    transported = tl.where(empty, 0.0, tl.where(invalid, float("nan"), transported))
    tl.store(value_linear_ptr + problem, transported)
    tl.store(
        marginal_error_ptr + problem, tl.where(empty, 0.0, tl.where(invalid, float("nan"), error))
    )
    tl.store(n_iter_ptr + problem, iteration)
    tl.store(status_ptr + problem, status)
    tl.store(residual_ptr + problem, 0.0)
    F = tl.where((A == -INFINITY) | empty, 0.0, tl.where(invalid, float("nan"), F))
    G = tl.where((B == -INFINITY) | empty, 0.0, tl.where(invalid, float("nan"), G))
    tl.debug_barrier()
    tl.store(f_ptr + rows, F, mask=rows < n)
    tl.store(g_ptr + columns, G, mask=columns < m)
