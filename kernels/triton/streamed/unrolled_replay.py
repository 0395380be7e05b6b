"""Replay of a streamed run for unrolled gradients: the vectors of every half-step.

Per half-step only vectors are stored: the input potential f, the soft-min s and, in the reverse
sweep, the adjoint v of the soft-min. The plan of the half-step can be recomputed from them at any
tile,

    pi_ij = a_i exp((f_i + s_j - C_ij) / T)        each column sums to 1

In float32 a soft-min alone cannot make columns sum to 1, since exponents of about a thousand have
lost their last digits. s is therefore stored in two parts: an anchor, the soft-min of the previous
iteration, and a correction, log2 of the sum relative to the anchor.

State of a problem:

    STATE_ACTIVE    replayed and differentiated
    STATE_EMPTY     a side has no valid entry, or the upstream gradients are 0; so are all others
    STATE_INVALID   a potential is not finite, as in malformed problems; all gradients are NaN
    STATE_ONCHIP    small enough for ``onchip.unrolled``, ignored here
"""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    INFINITY,
    LOG2_E,
    cost_tile,
    extent,
    load_epsilon,
    load_log_mass,
    locate_cost,
    penalty_slopes,
    plan_tile,
    step_factor,
    without_mass,
)

# States of a problem.
STATE_ACTIVE = tl.constexpr(0)
STATE_EMPTY = tl.constexpr(1)
STATE_ONCHIP = tl.constexpr(2)
STATE_INVALID = tl.constexpr(3)


@triton.jit(do_not_specialize=["n", "m", "least"])
def survey_kernel(
    cu_a_ptr,
    cu_b_ptr,
    log_a_ptr,
    log_b_ptr,
    f_ptr,
    n_iter_ptr,
    grad_value_ptr,
    grad_value_linear_ptr,
    grad_f_ptr,
    grad_g_ptr,
    state_ptr,
    steps_ptr,
    n,
    m,
    least,
    PACKED: tl.constexpr,
    POTENTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set the state of each problem and the number of iterations to replay."""
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    any_valid_a = tl.zeros((BLOCK,), tl.int32)
    any_valid_b = tl.zeros((BLOCK,), tl.int32)
    not_finite = tl.zeros((BLOCK,), tl.int32)
    used = tl.zeros((BLOCK,), tl.int32)
    for block_start in range(0, n, BLOCK):
        index = block_start + tl.arange(0, BLOCK)
        A = load_log_mass(log_a_ptr + offset_a, index, n)
        f = tl.load(f_ptr + offset_a + index, mask=index < n, other=0.0)
        any_valid_a = tl.maximum(any_valid_a, (A != -INFINITY).to(tl.int32))
        not_finite = tl.maximum(not_finite, tl.where(tl.abs(f) < INFINITY, 0, 1))
        if POTENTIALS:
            upstream = tl.load(grad_f_ptr + offset_a + index, mask=index < n, other=0.0)
            used = tl.maximum(used, (upstream != 0).to(tl.int32))
    for block_start in range(0, m, BLOCK):
        index = block_start + tl.arange(0, BLOCK)
        B = load_log_mass(log_b_ptr + offset_b, index, m)
        any_valid_b = tl.maximum(any_valid_b, (B != -INFINITY).to(tl.int32))
        if POTENTIALS:
            upstream = tl.load(grad_g_ptr + offset_b + index, mask=index < m, other=0.0)
            used = tl.maximum(used, (upstream != 0).to(tl.int32))
    state = tl.where(tl.max(not_finite, 0) > 0, STATE_INVALID, STATE_ACTIVE)
    empty = (tl.max(any_valid_a, 0) == 0) | (tl.max(any_valid_b, 0) == 0)
    unused = (tl.load(grad_value_ptr + problem) == 0) & (tl.max(used, 0) == 0)
    empty = empty | (unused & (tl.load(grad_value_linear_ptr + problem) == 0))
    state = tl.where(empty, STATE_EMPTY, state)
    state = tl.where(tl.maximum(n, m) <= least, STATE_ONCHIP, state)
    tl.store(state_ptr + problem, state)
    steps = tl.where(state == STATE_ACTIVE, tl.load(n_iter_ptr + problem), 0)
    tl.store(steps_ptr + problem, steps)


@triton.jit
def relaxation_factors(epsilon, annealing_ptr, k, omega, inverse_rho):
    """Return the temperature of iteration k and the factors of old potential and soft-min."""
    temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
    relaxation = tl.where((k == 0) | (temperature != epsilon), 1.0, omega)
    return temperature, 1 - relaxation, step_factor(relaxation, temperature, inverse_rho)


@triton.jit
def plan_scores(cost, allowed, potential, anchor, log_mass, temperature):
    """Compute log2 of the plan of a half-step, up to the corrections; arguments are broadcast."""
    score = (potential + anchor - cost) * (LOG2_E / temperature) + log_mass
    return tl.where(allowed, score, -INFINITY)


@triton.jit(
    do_not_specialize=["n", "m", "stride_n", "stride_m", "k", "total_rows", "total_columns"]
)
def forth_kernel(
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
    steps_ptr,
    annealing_ptr,
    path_ptr,
    anchor_ptr,
    correction_ptr,
    other_path_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    k,
    total_rows,
    total_columns,
    inverse_rho,
    omega,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    """Replay a half-step of iteration k: store its soft-mins and the updated potentials.

    The soft-mins are the anchors of the next iteration.
    """
    problem = tl.program_id(0).to(tl.int64)
    if k >= tl.load(steps_ptr + problem):
        return
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = load_epsilon(epsilon_ptr, problem)
    temperature, retained, step_size = relaxation_factors(
        epsilon, annealing_ptr, k, omega, inverse_rho
    )
    step = k.to(tl.int64)
    path_ptr += step * total_rows + offset_a
    anchor_ptr += step * total_rows + offset_a
    correction_ptr += step * total_rows + offset_a
    other_path_ptr += step * total_columns + offset_b
    for row_start in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_start + tl.arange(0, BLOCK_N)
        valid = load_log_mass(log_a_ptr + offset_a, rows, n) != -INFINITY
        anchor = tl.load(anchor_ptr + rows, mask=rows < n, other=0.0)
        peak = tl.full((BLOCK_N,), -INFINITY, tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for column_start in range(0, m, BLOCK_M):
            columns = column_start + tl.arange(0, BLOCK_M)
            B = load_log_mass(log_b_ptr + offset_b, columns, m)
            g = tl.load(other_path_ptr + columns, mask=columns < m, other=0.0)
            cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
            allowed = valid[:, None] & (B != -INFINITY)[None, :] & (cost < INFINITY)
            score = plan_scores(cost, allowed, g[None, :], anchor[:, None], B[None, :], temperature)
            new_peak = tl.maximum(peak, tl.max(score, 1))
            shift = tl.where(new_peak > -INFINITY, new_peak, 0.0)
            total *= tl.exp2(tl.where(peak > -INFINITY, peak - shift, 0.0))
            total += tl.sum(tl.exp2(score - shift[:, None]), 1)
            peak = new_peak
        has_pair = peak > -INFINITY
        correction = tl.where(has_pair, peak + tl.log2(tl.where(has_pair, total, 1.0)), 0.0)
        softmin = tl.where(has_pair, anchor - correction * temperature / LOG2_E, 0.0)
        f = tl.load(path_ptr + rows, mask=rows < n, other=0.0)
        tl.store(correction_ptr + rows, correction, mask=rows < n)
        tl.store(anchor_ptr + total_rows + rows, softmin, mask=rows < n)
        tl.store(path_ptr + total_rows + rows, retained * f + step_size * softmin, mask=rows < n)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "total_rows", "total_columns"])
def weight_kernel(
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
    state_ptr,
    steps_ptr,
    path_ptr,
    other_path_ptr,
    grad_value_ptr,
    weight_ptr,
    grad_log_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    total_rows,
    total_columns,
    inverse_rho,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    """Compute the derivative of the value with respect to the last plan, and to the log-masses.

    The former is a weight per row and per column.
    """
    problem = tl.program_id(0).to(tl.int64)
    state = tl.load(state_ptr + problem)
    if state == STATE_ONCHIP:
        return
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = load_epsilon(epsilon_ptr, problem)
    upstream = tl.load(grad_value_ptr + problem)
    last = tl.load(steps_ptr + problem).to(tl.int64)
    path_ptr += last * total_rows + offset_a
    other_path_ptr += last * total_columns + offset_b
    for row_start in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_start + tl.arange(0, BLOCK_N)
        A = load_log_mass(log_a_ptr + offset_a, rows, n)
        f = tl.load(path_ptr + rows, mask=rows < n, other=0.0)
        sums = tl.zeros((BLOCK_N,), tl.float32)
        share = tl.zeros((BLOCK_N,), tl.float32)
        masses = tl.zeros((BLOCK_M,), tl.float32)
        for column_start in range(0, m, BLOCK_M):
            columns = column_start + tl.arange(0, BLOCK_M)
            B = load_log_mass(log_b_ptr + offset_b, columns, m)
            g = tl.load(other_path_ptr + columns, mask=columns < m, other=0.0)
            cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
            sums += tl.sum(plan_tile(cost, A, B, f, g, LOG2_E / epsilon), 1)
            masses += tl.exp2(B)
            if inverse_rho > 0:
                plan = plan_tile(cost, without_mass(A), B, f, g, LOG2_E / epsilon)
                share += tl.sum(plan, 1)
        a = tl.exp2(A)
        grad = upstream * epsilon * (a * tl.sum(masses, 0) - sums)
        weight = f
        if inverse_rho > 0:
            slope, by_mass = penalty_slopes(share, sums, A, a, inverse_rho)
            weight += slope
            grad += upstream * by_mass
        valid = A != -INFINITY
        active = valid & (state == STATE_ACTIVE)
        grad = tl.where(active, grad, 0.0)
        grad = tl.where(valid & (state == STATE_INVALID), float("nan"), grad)
        tl.store(weight_ptr + offset_a + rows, tl.where(active, weight, 0.0), mask=rows < n)
        tl.store(grad_log_ptr + offset_a + rows, grad, mask=rows < n)
