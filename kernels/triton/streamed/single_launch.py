"""Streamed Sinkhorn with one program per problem and all iterations in one launch.

It serves packed problems, whose sizes the host does not know, and large batches. The results have
the same bits as those of ``stepwise``.
"""

import triton
import triton.language as tl
from optical.kernels.streamed.half_precision import (
    STATE_EXACT,
    STATE_EXACT_ONLY,
    STATE_STORE,
    half_step,
    initial_state,
    next_state,
    store_plan,
)
from optical.kernels.streamed.logsumexp import SUMS, reduce_rows
from optical.kernels.streamed.potentials import (
    init_potential,
    marginal_error,
    update_potential,
    write_outputs,
)
from optical.kernels.tiles import INFINITY, LOG2_E, extent, locate_cost, step_factor, swap_sides


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "max_iter", "least"])
def loop_kernel(
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
    result_a_ptr,
    result_b_ptr,
    cost_sum_a_ptr,
    cost_sum_b_ptr,
    base_a_ptr,
    base_b_ptr,
    plan_ptr,
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
    width,
    plane,
    max_iter,
    tol,
    inverse_rho_a,
    inverse_rho_b,
    omega,
    anneal_start,
    anneal_ratio,
    least,
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
    FAST: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run all iterations of each problem with more than ``least`` rows or columns."""
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if tl.maximum(n, m) <= least:
        return
    starts = (f0_ptr + offset_a, g0_ptr + offset_b)
    rows = (
        log_a_ptr + offset_a,
        f_ptr + offset_a,
        result_a_ptr + offset_a,
        cost_sum_a_ptr + offset_a,
        base_a_ptr + offset_a,
    )
    columns = (
        log_b_ptr + offset_b,
        g_ptr + offset_b,
        result_b_ptr + offset_b,
        cost_sum_b_ptr + offset_b,
        base_b_ptr + offset_b,
    )
    stored = (plan_ptr + problem * plane, width)
    row_bases = (rows[0], rows[4])
    column_bases = (columns[0], columns[4])
    outputs = (
        value_ptr,
        value_linear_ptr,
        marginal_error_ptr,
        n_iter_ptr,
        status_ptr,
        residual_ptr,
    )
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = tl.load(epsilon_ptr + problem)
    valid_epsilon = (epsilon > 0) & (epsilon < INFINITY)
    epsilon = tl.where(valid_epsilon, epsilon, 1.0)
    scale = LOG2_E / epsilon
    init_potential(rows[1], starts[0], n, scale, START, BLOCK)
    init_potential(columns[1], starts[1], m, scale, START, BLOCK)
    iteration = 0
    stop = False
    at_epsilon = False
    annealing = anneal_start
    column_error = 0.0
    running = max_iter > 0
    state = 0
    if FAST:
        state = initial_state(rows[0], n, BLOCK)
    while running:
        temperature = tl.maximum(epsilon, annealing)
        annealing *= anneal_ratio
        ratio = epsilon / temperature
        relaxation = tl.where((iteration == 0) | (temperature != epsilon), 1.0, omega)
        tl.debug_barrier()
        if FAST and state == STATE_STORE:
            store_plan(costs, row_bases, column_bases, stored, 0, BLOCK_N, scale, SPEC, TILE)
            tl.debug_barrier()
        half_step(
            costs, rows, columns, stored, state, 0, BLOCK_N, scale, ratio, True, FAST, SPEC, TILE
        )
        tl.debug_barrier()
        if (tol > 0) & at_epsilon:
            error = marginal_error(rows, n, ratio, epsilon * inverse_rho_a, BLOCK)
            stop = error + column_error <= tol
            if FAST:
                # Half precision never decides convergence; exact iterations follow.
                undecided = stop & (state > STATE_EXACT)
                state = tl.where(undecided, STATE_EXACT_ONLY, state)
                stop = stop & (undecided == 0)
        at_epsilon = temperature == epsilon
        if stop == 0:
            tl.debug_barrier()
            beta = step_factor(relaxation, temperature, inverse_rho_a)
            change = update_potential(rows, n, relaxation, beta, state, FAST, BLOCK)
            tl.debug_barrier()
            half_step(
                swap_sides(costs),
                columns,
                rows,
                stored,
                state,
                0,
                BLOCK_N,
                scale,
                ratio,
                False,
                FAST,
                SPEC,
                TILE,
            )
            tl.debug_barrier()
            beta = step_factor(relaxation, temperature, inverse_rho_b)
            change_b = update_potential(columns, m, relaxation, beta, state, FAST, BLOCK)
            if (tol > 0) & (omega != 1):
                # Over-relaxation leaves the columns inexact, too.
                tl.debug_barrier()
                column_error = marginal_error(columns, m, ratio, epsilon * inverse_rho_b, BLOCK)
            iteration += 1
            if FAST:
                change = tl.maximum(change, change_b)
                state = next_state(state, change, at_epsilon, max_iter - iteration)
        running = (iteration < max_iter) & (stop == 0)
    tl.debug_barrier()
    reduce_rows(costs, rows, columns, 0, BLOCK_N, scale, 1.0, SUMS, SPEC, TILE)
    reduce_rows(swap_sides(costs), columns, rows, 0, BLOCK_N, scale, 1.0, SUMS, SPEC, TILE)
    tl.debug_barrier()
    write_outputs(
        problem,
        epsilon,
        valid_epsilon,
        starts,
        rows,
        columns,
        outputs,
        n,
        m,
        iteration,
        tol,
        max_iter,
        inverse_rho_a,
        inverse_rho_b,
        START,
        BLOCK,
    )
