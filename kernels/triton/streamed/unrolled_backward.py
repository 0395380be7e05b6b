"""Reverse sweep and gradients of a streamed unrolled run, one launch per half-step.

The gradient of the cost is that of the last plan plus the sum over the iterations of
pi_ij v_j + sigma_ij v_i, where pi and sigma are the plans of the two half-steps and v the adjoints
of their soft-mins (see ``unrolled_replay``). No matrix is stored. A program takes rows of one side
and loops over the other; for the columns the sides are exchanged.
"""

import triton
import triton.language as tl
from optical.kernels.gradients import store_gradient, vector_weights
from optical.kernels.streamed.unrolled_replay import (
    STATE_ACTIVE,
    STATE_EMPTY,
    STATE_INVALID,
    STATE_ONCHIP,
    plan_scores,
    relaxation_factors,
)
from optical.kernels.tiles import (
    GIVEN,
    INFINITY,
    LOG2_E,
    cost_tile,
    extent,
    load_epsilon,
    load_log_mass,
    load_vectors,
    locate_cost,
    plan_tile,
)


@triton.jit
def final_plan(cost, A, B, f, g, epsilon, weights, upstream, upstream_linear):
    """Return a tile of the last plan, and the gradient with respect to its logarithm."""
    weight_a, weight_b = weights
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    weight = upstream * (weight_a[:, None] + weight_b[None, :])
    flow = plan * (weight + upstream_linear * tl.where(plan > 0, cost, 0.0))
    return plan, tl.where(plan != 0, flow, 0.0)


@triton.jit(
    do_not_specialize=["n", "m", "stride_n", "stride_m", "k", "total_rows", "total_columns"]
)
def back_kernel(
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
    annealing_ptr,
    path_ptr,
    other_path_ptr,
    other_anchor_ptr,
    other_correction_ptr,
    adjoint_ptr,
    other_adjoint_ptr,
    weight_ptr,
    other_weight_ptr,
    grad_value_ptr,
    grad_value_linear_ptr,
    grad_f_ptr,
    bar_ptr,
    grad_log_ptr,
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
    INIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    POTENTIALS: tl.constexpr,
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
    """Propagate gradients to the potentials of one side before iteration k.

    With INIT these are the potentials after the run. The gradient is split into the adjoint of the
    soft-min that produced the potential and, under over-relaxation, a part for the previous
    iteration.
    """
    problem = tl.program_id(0).to(tl.int64)
    steps = tl.load(steps_ptr + problem)
    if tl.load(state_ptr + problem) != STATE_ACTIVE:
        return
    if INIT:
        k = steps
    elif k >= steps:
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
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    step = k.to(tl.int64)
    # Rows are updated before columns, so the columns' plan has the rows' new potentials.
    path_step = step if COLUMNS or INIT else step + 1
    path_ptr += path_step * total_rows + offset_a
    other_path_ptr += step * total_columns + offset_b
    other_anchor_ptr += step * total_columns + offset_b
    other_correction_ptr += step * total_columns + offset_b
    other_adjoint_ptr += step * total_columns + offset_b
    temperature = epsilon
    if not INIT:
        temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
    # The iteration whose soft-mins produced these potentials.
    target_step = k - 1 if COLUMNS else k
    has_target = (target_step >= 0) & (target_step < steps)
    _temperature, retained, step_size = relaxation_factors(
        epsilon, annealing_ptr, tl.where(has_target, target_step, 0), omega, inverse_rho
    )
    adjoint_ptr += target_step.to(tl.int64) * total_rows + offset_a
    for row_start in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_start + tl.arange(0, BLOCK_N)
        row_mask = rows < n
        A = load_log_mass(log_a_ptr + offset_a, rows, n)
        valid_rows = A != -INFINITY
        f = tl.load(path_ptr + rows, mask=row_mask, other=0.0)
        row_weight = f
        if INIT:
            row_weight = tl.load(weight_ptr + offset_a + rows, mask=row_mask, other=0.0)
        total = tl.zeros((BLOCK_N,), tl.float32)
        least_cost = tl.full((BLOCK_N,), INFINITY, tl.float32)
        for column_start in range(0, m, BLOCK_M):
            columns = column_start + tl.arange(0, BLOCK_M)
            column_mask = columns < m
            B = load_log_mass(log_b_ptr + offset_b, columns, m)
            cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
            if INIT:
                g = tl.load(other_path_ptr + columns, mask=column_mask, other=0.0)
                weight = tl.load(other_weight_ptr + offset_b + columns, mask=column_mask, other=0.0)
                _plan, flow = final_plan(
                    cost, A, B, f, g, epsilon, (row_weight, weight), upstream, upstream_linear
                )
                least_cost = tl.minimum(
                    least_cost, tl.min(tl.where((B != -INFINITY)[None, :], cost, INFINITY), 1)
                )
            else:
                anchor = tl.load(other_anchor_ptr + columns, mask=column_mask, other=0.0)
                correction = tl.load(other_correction_ptr + columns, mask=column_mask, other=0.0)
                v = tl.load(other_adjoint_ptr + columns, mask=column_mask, other=0.0)
                allowed = valid_rows[:, None] & (B != -INFINITY)[None, :] & (cost < INFINITY)
                log_mass = A[:, None] - correction[None, :]
                score = plan_scores(
                    cost, allowed, f[:, None], anchor[None, :], log_mass, temperature
                )
                flow = tl.exp2(score) * v[None, :]
            total += tl.sum(flow, 1)
        log_total = total
        if INIT:
            bar = total / epsilon
            if POTENTIALS:
                upstream_f = tl.load(grad_f_ptr + offset_a + rows, mask=row_mask, other=0.0)
                bar += tl.where(least_cost < INFINITY, upstream_f, 0.0)
        else:
            bar = tl.load(bar_ptr + offset_a + rows, mask=row_mask, other=0.0) - total
            log_total = -temperature * total
        bar = tl.where(valid_rows, bar, 0.0)
        grad = tl.load(grad_log_ptr + offset_a + rows, mask=row_mask, other=0.0)
        grad = tl.where(valid_rows, grad + log_total, 0.0)
        tl.store(grad_log_ptr + offset_a + rows, grad, mask=row_mask)
        tl.store(adjoint_ptr + rows, step_size * bar, mask=row_mask & has_target)
        tl.store(
            bar_ptr + offset_a + rows, tl.where(has_target, retained * bar, bar), mask=row_mask
        )


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "total_rows", "total_columns"])
def unrolled_gradient_kernel(
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
    annealing_ptr,
    path_ptr,
    other_path_ptr,
    anchor_ptr,
    other_anchor_ptr,
    correction_ptr,
    other_correction_ptr,
    adjoint_ptr,
    other_adjoint_ptr,
    weight_ptr,
    other_weight_ptr,
    grad_value_ptr,
    grad_value_linear_ptr,
    grad_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    total_rows,
    total_columns,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    """Compute the gradient of one side's vectors, or of a given cost, over all iterations."""
    problem = tl.program_id(0).to(tl.int64)
    state = tl.load(state_ptr + problem)
    steps = tl.load(steps_ptr + problem)
    if state == STATE_ONCHIP:
        return
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    if KIND == GIVEN:
        grad_ptr += problem * n * m
    else:
        grad_ptr += offset_a * dim
    epsilon = load_epsilon(epsilon_ptr, problem)
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    wide_a, wide_b = total_rows.to(tl.int64), total_columns.to(tl.int64)
    path_ptr += offset_a
    other_path_ptr += offset_b
    anchor_ptr += offset_a
    other_anchor_ptr += offset_b
    correction_ptr += offset_a
    other_correction_ptr += offset_b
    adjoint_ptr += offset_a
    other_adjoint_ptr += offset_b
    d = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    for row_start in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_start + tl.arange(0, BLOCK_N)
        row_mask = rows < n
        A = load_log_mass(log_a_ptr + offset_a, rows, n)
        valid_rows = (A != -INFINITY) & (state != STATE_EMPTY)
        row_weight = tl.load(weight_ptr + offset_a + rows, mask=row_mask, other=0.0)
        self_weight = tl.zeros((BLOCK_N,), tl.float32)
        dot_sum = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
        for column_start in range(0, m, BLOCK_M):
            columns = column_start + tl.arange(0, BLOCK_M)
            column_mask = columns < m
            B = load_log_mass(log_b_ptr + offset_b, columns, m)
            valid_columns = (B != -INFINITY) & (state != STATE_EMPTY)
            cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
            valid = valid_rows[:, None] & valid_columns[None, :]
            allowed = valid & (cost < INFINITY)
            f = tl.load(path_ptr + steps * wide_a + rows, mask=row_mask, other=0.0)
            g = tl.load(other_path_ptr + steps * wide_b + columns, mask=column_mask, other=0.0)
            weight = tl.load(other_weight_ptr + offset_b + columns, mask=column_mask, other=0.0)
            plan, flow = final_plan(
                cost, A, B, f, g, epsilon, (row_weight, weight), upstream, upstream_linear
            )
            grad = (upstream + upstream_linear) * plan - flow / epsilon
            for k in range(steps):
                temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
                row_base, column_base = k * wide_a, k * wide_b
                # The columns' half-step reads new potentials of the rows, the rows' half-step old
                # ones of the columns.
                row_path = row_base if COLUMNS else row_base + wide_a
                column_path = column_base + wide_b if COLUMNS else column_base
                f = tl.load(path_ptr + row_path + rows, mask=row_mask, other=0.0)
                g = tl.load(other_path_ptr + column_path + columns, mask=column_mask, other=0.0)
                anchor_a = tl.load(anchor_ptr + row_base + rows, mask=row_mask, other=0.0)
                anchor_b = tl.load(
                    other_anchor_ptr + column_base + columns, mask=column_mask, other=0.0
                )
                correction_a = tl.load(correction_ptr + row_base + rows, mask=row_mask, other=0.0)
                correction_b = tl.load(
                    other_correction_ptr + column_base + columns, mask=column_mask, other=0.0
                )
                v_a = tl.load(adjoint_ptr + row_base + rows, mask=row_mask, other=0.0)
                v_b = tl.load(
                    other_adjoint_ptr + column_base + columns, mask=column_mask, other=0.0
                )
                log_mass = A[:, None] - correction_b[None, :]
                score = plan_scores(
                    cost, allowed, f[:, None], anchor_b[None, :], log_mass, temperature
                )
                grad += tl.exp2(score) * v_b[None, :]
                log_mass = B[None, :] - correction_a[:, None]
                score = plan_scores(
                    cost, allowed, g[None, :], anchor_a[:, None], log_mass, temperature
                )
                grad += tl.exp2(score) * v_a[:, None]
            grad = tl.where(allowed, grad, 0.0)
            grad = tl.where(valid & (state == STATE_INVALID), float("nan"), grad)
            if KIND == GIVEN:
                target = rows[:, None].to(tl.int64) * m + columns[None, :]
                tl.store(grad_ptr + target, grad, mask=row_mask[:, None] & column_mask[None, :])
            else:
                dot_weight, tile_self_weight = vector_weights(grad, cost, costs, columns, SPEC)
                self_weight += tile_self_weight
                y = load_vectors(costs[1], costs[2], columns, d, dim, SPEC)
                y = tl.where(valid_columns[:, None], y, 0.0).to(DOT_DTYPE)
                dot_sum = tl.dot(
                    dot_weight.to(DOT_DTYPE), y, dot_sum, input_precision=DOT_PRECISION
                )
        if KIND != GIVEN:
            A = tl.where(valid_rows, A, -INFINITY)
            store_gradient(grad_ptr, costs, rows, A, d, self_weight, dot_sum, SPEC)
