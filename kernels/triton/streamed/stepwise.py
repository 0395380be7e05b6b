"""Streamed Sinkhorn with many programs per problem, one launch per half-step and update.

    F_i <- -log2 sum_j exp2(B_j + G_j - S_ij)

``walk_kernel`` reduces and ``turn_kernel`` updates the potentials of one side. Any number of
programs share the rows of a problem; where these are too few to fill a GPU they share the columns
as well, and ``gather_kernel`` merges the segments. Problems that have stopped cost only the
launches. ``single_launch`` computes the same bits with one program per problem.

With FAST, most iterations multiply with a plan in half precision; see ``half_precision``.
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
from optical.kernels.streamed.logsumexp import (
    SEGMENT,
    SUMS,
    merge,
    reduce_rows,
    reduce_segments,
    softmin,
)
from optical.kernels.streamed.potentials import (
    init_potential,
    marginal_error,
    update_potential,
    write_outputs,
)
from optical.kernels.tiles import INFINITY, LOG2_E, extent, load_epsilon, locate_cost, step_factor


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "row_count"])
def walk_kernel(
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
    result_ptr,
    cost_sum_ptr,
    base_a_ptr,
    base_b_ptr,
    plan_ptr,
    partial_ptr,
    state_ptr,
    stopped_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    row_count,
    width,
    plane,
    annealing,
    SPLIT: tl.constexpr,
    REDUCE: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
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
    """Reduce the rows of each problem; for the columns the sides are exchanged.

    With SPLIT, programs share the columns too and ``gather_kernel`` must follow.
    """
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(stopped_ptr + problem) != 0 and REDUCE != SUMS:
        return
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = load_epsilon(epsilon_ptr, problem)
    row_side = (
        log_a_ptr + offset_a,
        f_ptr + offset_a,
        result_ptr + offset_a,
        cost_sum_ptr + offset_a,
        base_a_ptr + offset_a,
    )
    column_side = (
        log_b_ptr + offset_b,
        g_ptr + offset_b,
        row_side[2],
        row_side[3],
        base_b_ptr + offset_b,
    )
    first_row = tl.program_id(1) * BLOCK_N
    row_step = tl.num_programs(1) * BLOCK_N
    scale = LOG2_E / epsilon
    ratio = epsilon / tl.maximum(epsilon, annealing)
    if REDUCE == SUMS:
        reduce_rows(costs, row_side, column_side, first_row, row_step, scale, 1.0, SUMS, SPEC, TILE)
    elif SPLIT:
        segment = tl.program_id(2)
        segment_step = tl.num_programs(2)
        partial_ptr += offset_a
        reduce_segments(
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
            SPEC,
            TILE,
        )
    else:
        stored = (plan_ptr + problem * plane, width)
        state = 0
        if FAST:
            state = tl.load(state_ptr + problem)
        half_step(
            costs,
            row_side,
            column_side,
            stored,
            state,
            first_row,
            row_step,
            scale,
            ratio,
            ROWS,
            FAST,
            SPEC,
            TILE,
        )


@triton.jit(do_not_specialize=["n", "m", "row_count"])
def gather_kernel(
    cu_a_ptr,
    cu_b_ptr,
    epsilon_ptr,
    partial_ptr,
    result_ptr,
    stopped_ptr,
    n,
    m,
    row_count,
    annealing,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the segments of each row into its soft-min."""
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(stopped_ptr + problem) != 0:
        return
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    _zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    epsilon = load_epsilon(epsilon_ptr, problem)
    ratio = epsilon / tl.maximum(epsilon, annealing)
    for block_start in range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        rows = block_start + tl.arange(0, BLOCK)
        mask = rows < n
        peak = tl.full((BLOCK,), -INFINITY, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        least_cost = tl.full((BLOCK,), INFINITY, tl.float32)
        source = partial_ptr + offset_a + rows
        for _ in range(0, m, SEGMENT):
            segment_peak = tl.load(source, mask=mask, other=-INFINITY)
            segment_total = tl.load(source + row_count, mask=mask, other=0.0)
            segment_least = tl.load(source + 2 * row_count, mask=mask, other=INFINITY)
            peak, total = merge(peak, total, segment_peak, segment_total)
            least_cost = tl.minimum(least_cost, segment_least)
            source += 3 * row_count
        tl.store(result_ptr + offset_a + rows, softmin(peak, total, least_cost, ratio), mask=mask)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m"])
def keep_kernel(
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
    base_a_ptr,
    base_b_ptr,
    plan_ptr,
    state_ptr,
    stopped_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    width,
    plane,
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
    """Store K of the problems in state STORE."""
    problem = tl.program_id(0).to(tl.int64)
    if (tl.load(stopped_ptr + problem) != 0) | (tl.load(state_ptr + problem) != STATE_STORE):
        return
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = tl.load(epsilon_ptr + problem)
    rows = (log_a_ptr + offset_a, base_a_ptr + offset_a)
    columns = (log_b_ptr + offset_b, base_b_ptr + offset_b)
    stored = (plan_ptr + problem * plane, width)
    first_row = tl.program_id(1) * BLOCK_N
    row_step = tl.num_programs(1) * BLOCK_N
    store_plan(costs, rows, columns, stored, first_row, row_step, LOG2_E / epsilon, SPEC, TILE)


@triton.jit(do_not_specialize=["n", "iteration", "remaining"])
def turn_kernel(
    cu_ptr,
    log_mass_ptr,
    epsilon_ptr,
    start_ptr,
    f_ptr,
    result_ptr,
    base_ptr,
    state_ptr,
    change_ptr,
    column_error_ptr,
    stopped_ptr,
    n_iter_ptr,
    n,
    iteration,
    remaining,
    tol,
    inverse_rho,
    omega,
    annealing,
    previous_annealing,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
    START: tl.constexpr,
    INIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stop a problem if it has converged; otherwise update the potentials of one side.

    ``previous_annealing`` is the annealing temperature of the previous iteration, ``remaining`` the
    number of iterations to come. With INIT there is no reduction yet, and the potentials are set to
    their start.
    """
    problem = tl.program_id(0).to(tl.int64)
    offset, n = extent(cu_ptr, problem, n, PACKED)
    epsilon = load_epsilon(epsilon_ptr, problem)
    if INIT:
        init_potential(f_ptr + offset, start_ptr + offset, n, LOG2_E / epsilon, START, BLOCK)
        tl.store(stopped_ptr + problem, 0)
        tl.store(n_iter_ptr + problem, 0)
        tl.store(column_error_ptr + problem, 0.0)
        if FAST and ROWS:
            tl.store(state_ptr + problem, initial_state(log_mass_ptr + offset, n, BLOCK))
        return
    if tl.load(stopped_ptr + problem) != 0:
        return
    side = (
        log_mass_ptr + offset,
        f_ptr + offset,
        result_ptr + offset,
        result_ptr + offset,
        base_ptr + offset,
    )
    state = 0
    if FAST:
        state = tl.load(state_ptr + problem)
    temperature = tl.maximum(epsilon, annealing)
    stop = False
    if ROWS and tol > 0:
        error = marginal_error(side, n, epsilon / temperature, epsilon * inverse_rho, BLOCK)
        error += tl.load(column_error_ptr + problem)
        stop = (error <= tol) & (tl.maximum(epsilon, previous_annealing) == epsilon)
        if FAST:
            # Half precision never decides convergence; exact iterations follow.
            undecided = stop & (state > STATE_EXACT)
            state = tl.where(undecided, STATE_EXACT_ONLY, state)
            stop = stop & (undecided == 0)
    if stop:
        tl.store(stopped_ptr + problem, 1)
    else:
        relaxation = tl.where((iteration == 0) | (temperature != epsilon), 1.0, omega)
        beta = step_factor(relaxation, temperature, inverse_rho)
        tl.debug_barrier()
        change = update_potential(side, n, relaxation, beta, state, FAST, BLOCK)
        if FAST and ROWS:
            tl.store(change_ptr + problem, change)
            tl.store(state_ptr + problem, state)
        elif FAST:
            change = tl.maximum(change, tl.load(change_ptr + problem))
            state = next_state(state, change, temperature == epsilon, remaining)
            tl.store(state_ptr + problem, state)
        if not ROWS:
            tl.store(n_iter_ptr + problem, iteration + 1)
            if (tol > 0) & (omega != 1):
                # Over-relaxation leaves the columns inexact, too.
                tl.debug_barrier()
                error = marginal_error(side, n, epsilon / temperature, epsilon * inverse_rho, BLOCK)
                tl.store(column_error_ptr + problem, error)


@triton.jit(do_not_specialize=["n", "m", "max_iter"])
def finish_kernel(
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
    value_ptr,
    value_linear_ptr,
    marginal_error_ptr,
    n_iter_ptr,
    status_ptr,
    residual_ptr,
    n,
    m,
    max_iter,
    tol,
    inverse_rho_a,
    inverse_rho_b,
    PACKED: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the outputs of each problem after its sums have been reduced."""
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    epsilon = tl.load(epsilon_ptr + problem)
    valid_epsilon = (epsilon > 0) & (epsilon < INFINITY)
    epsilon = tl.where(valid_epsilon, epsilon, 1.0)
    starts = (f0_ptr + offset_a, g0_ptr + offset_b)
    rows = (
        log_a_ptr + offset_a,
        f_ptr + offset_a,
        result_a_ptr + offset_a,
        cost_sum_a_ptr + offset_a,
    )
    columns = (
        log_b_ptr + offset_b,
        g_ptr + offset_b,
        result_b_ptr + offset_b,
        cost_sum_b_ptr + offset_b,
    )
    outputs = (
        value_ptr,
        value_linear_ptr,
        marginal_error_ptr,
        n_iter_ptr,
        status_ptr,
        residual_ptr,
    )
    iteration = tl.load(n_iter_ptr + problem)
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
