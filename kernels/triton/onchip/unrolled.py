"""Total derivative of a finite run, one program per problem, cost and gradient in registers.

The run is repeated and its potentials are stored, n + m numbers per iteration; then it is swept in
reverse. pi and sigma are the plans of the two half-steps: columns of pi and rows of sigma sum to
1. The half-steps have the differentials

    d g_j = -sum_i pi_ij d f_i + sum_i pi_ij d C_ij,    d f_i = -sum_j sigma_ij d g_j + ...

(the reference backend has all terms). Finally the gradient of the cost, still in registers, is
multiplied with the vectors.
"""

import triton
import triton.language as tl
from optical.kernels.gradients import store_gradient
from optical.kernels.tiles import (
    COSINE,
    GIVEN,
    INFINITY,
    LOG2_E,
    SQEUCLIDEAN,
    cost_tile,
    extent,
    load_epsilon,
    load_log_mass,
    load_vectors,
    locate_cost,
    log_sum_exp2,
    penalty_slopes,
    plan_tile,
    step_factor,
    swap_sides,
    without_mass,
)


@triton.jit(do_not_specialize=["steps"])
def annealing_kernel(annealing_ptr, steps, anneal_start, anneal_ratio):
    """Store the annealing temperature of each iteration, with the bits of the forward kernels."""
    annealing = anneal_start
    for k in range(steps):
        tl.store(annealing_ptr + k, annealing)
        annealing *= anneal_ratio


@triton.jit
def half_step_scores(cost, potential, log_mass, temperature, axis: tl.constexpr):
    """Compute the scores that a half-step sums along the axis, along which the vectors lie."""
    potential = tl.expand_dims(potential, 1 - axis)
    score = (potential - cost) * (LOG2_E / temperature) + tl.expand_dims(log_mass, 1 - axis)
    return tl.where(cost < INFINITY, score, -INFINITY)


@triton.jit
def half_step(cost, potential, log_mass, temperature, axis: tl.constexpr):
    """Return the soft-min along the axis, 0 without an allowed pair, and the softmax of its scores.

    Exponents of about a thousand have lost digits that their differences still have. Both results
    are therefore recomputed relative to a first estimate of the soft-min.
    """
    scale = LOG2_E / temperature
    total, has_pair = log_sum_exp2(
        half_step_scores(cost, potential, log_mass, temperature, axis), axis
    )
    estimate = tl.where(has_pair, -total / scale, 0.0)
    shifted = tl.expand_dims(potential, 1 - axis) + tl.expand_dims(estimate, axis)
    score = (shifted - cost) * scale + tl.expand_dims(log_mass, 1 - axis)
    softmax = tl.exp2(tl.where(cost < INFINITY, score, -INFINITY))
    total = tl.where(has_pair, tl.sum(softmax, axis), 1.0)
    return estimate - tl.log2(total) / scale, softmax / tl.expand_dims(total, axis)


@triton.jit
def row_block(x, block, ROWS: tl.constexpr):
    """Select ROWS rows of a vector or a matrix, which stays in registers."""
    BLOCKS: tl.constexpr = x.shape[0] // ROWS
    if len(x.shape) == 1:
        x = tl.reshape(x, (BLOCKS, ROWS))
        chosen = (tl.arange(0, BLOCKS) == block)[:, None]
    else:
        x = tl.reshape(x, (BLOCKS, ROWS, x.shape[1]))
        chosen = (tl.arange(0, BLOCKS) == block)[:, None, None]
    return tl.sum(tl.where(chosen, x, 0.0), 0)


@triton.jit
def multiply_vectors(costs, sides, dot_weight, self_weight, SPEC: tl.constexpr, DOT: tl.constexpr):
    """Store the gradient of the vectors of the rows from the weights of ``vector_weights``.

    Shared memory holds the weights of ROWS rows at a time.
    """
    grad_ptr, log_mass_ptr, empty, valid_columns = sides
    DOT_DTYPE: tl.constexpr = DOT[0]
    DOT_PRECISION: tl.constexpr = DOT[1]
    BLOCK_G: tl.constexpr = DOT[2]
    ROWS: tl.constexpr = DOT[3]
    dim = costs[3]
    columns = tl.arange(0, dot_weight.shape[1])
    for block in range(dot_weight.shape[0] // ROWS):
        rows = block * ROWS + tl.arange(0, ROWS)
        A = load_log_mass(log_mass_ptr, rows, costs[0][4])
        A = tl.where(empty, -INFINITY, A)
        weight = row_block(dot_weight, block, ROWS).to(DOT_DTYPE)
        own_weight = row_block(self_weight, block, ROWS)
        for d0 in range(0, dim, BLOCK_G):
            d = d0 + tl.arange(0, BLOCK_G)
            y = load_vectors(costs[1], costs[2], columns, d, dim, SPEC)
            y = tl.where(valid_columns[:, None], y, 0.0).to(DOT_DTYPE)
            dot_sum = tl.dot(weight, y, input_precision=DOT_PRECISION)
            store_gradient(grad_ptr, costs, rows, A, d, own_weight, dot_sum, SPEC)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "max_iter", "least", "most"])
def unrolled_kernel(
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
    n_iter_ptr,
    annealing_ptr,
    path_f_ptr,
    path_g_ptr,
    grad_value_ptr,
    grad_value_linear_ptr,
    grad_f_ptr,
    grad_g_ptr,
    grad_x_ptr,
    grad_y_ptr,
    grad_log_a_ptr,
    grad_log_b_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    max_iter,
    inverse_rho_a,
    inverse_rho_b,
    omega,
    least,
    most,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    START: tl.constexpr,
    POTENTIALS: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_Y: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    """Differentiate the run of one problem; store the gradients of masses, vectors or cost."""
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if PACKED:
        longest = tl.maximum(n, m)
        if (longest < least) | (longest > most):
            return
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    path_f_ptr += offset_a * (max_iter + 1) + rows
    path_g_ptr += offset_b * (max_iter + 1) + columns
    if KIND == GIVEN:
        grad_x_ptr += problem * n * m
    else:
        grad_x_ptr += offset_a * dim
        grad_y_ptr += offset_b * dim
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    mask_a = rows < n
    mask_b = columns < m
    A = load_log_mass(log_a_ptr + offset_a, rows, n)
    B = load_log_mass(log_b_ptr + offset_b, columns, m)
    valid_a = A != -INFINITY
    valid_b = B != -INFINITY
    final_f = tl.load(f_ptr + offset_a + rows, mask=mask_a, other=0.0)
    # The potentials of a malformed problem are NaN; its gradients are, too.
    invalid = tl.max(tl.where(tl.abs(final_f) < INFINITY, 0, 1), 0) > 0
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    unused = (upstream == 0) & (upstream_linear == 0)
    if POTENTIALS:
        upstream_f = tl.load(grad_f_ptr + offset_a + rows, mask=mask_a, other=0.0)
        upstream_g = tl.load(grad_g_ptr + offset_b + columns, mask=mask_b, other=0.0)
        unused = unused & (tl.max((upstream_f != 0).to(tl.int32), 0) == 0)
        unused = unused & (tl.max((upstream_g != 0).to(tl.int32), 0) == 0)
    # All gradients of such a problem are 0.
    empty = tl.max(valid_a.to(tl.int32), 0) * tl.max(valid_b.to(tl.int32), 0) == 0
    empty = empty | unused
    skip = invalid | empty
    skipped = tl.where(empty, 0.0, float("nan"))
    steps = tl.where(skip, 0, tl.load(n_iter_ptr + problem))
    epsilon = load_epsilon(epsilon_ptr, problem)
    cost = cost_tile(costs, 0, 0, SPEC, (BLOCK_N, BLOCK_M, BLOCK_D, PART, WARPS_N, WARPS_M))
    cost = tl.where(valid_a[:, None] & valid_b[None, :], cost, INFINITY)
    has_pair_a = tl.min(cost, 1) < INFINITY
    has_pair_b = tl.min(cost, 0) < INFINITY
    f = tl.zeros((BLOCK_N,), tl.float32)
    g = tl.zeros((BLOCK_M,), tl.float32)
    if START:
        f = tl.load(f0_ptr + offset_a + rows, mask=mask_a, other=0.0)
        g = tl.load(g0_ptr + offset_b + columns, mask=mask_b, other=0.0)
        f = tl.where(has_pair_a, f, 0.0)
        g = tl.where(has_pair_b, g, 0.0)
    tl.store(path_f_ptr, f, mask=mask_a)
    tl.store(path_g_ptr, g, mask=mask_b)
    for k in range(steps):
        temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
        relaxation = tl.where((k == 0) | (temperature != epsilon), 1.0, omega)
        softmin, _ = half_step(cost, g, B, temperature, 1)
        f = (1 - relaxation) * f + step_factor(relaxation, temperature, inverse_rho_a) * softmin
        softmin, _ = half_step(cost, f, A, temperature, 0)
        g = (1 - relaxation) * g + step_factor(relaxation, temperature, inverse_rho_b) * softmin
        tl.store(path_f_ptr + (k + 1) * n, f, mask=mask_a)
        tl.store(path_g_ptr + (k + 1) * m, g, mask=mask_b)

    upstream = tl.where(skip, 0.0, upstream)
    upstream_linear = tl.where(skip, 0.0, upstream_linear)
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    row_sum = tl.sum(plan, 1)
    column_sum = tl.sum(plan, 0)
    a = tl.exp2(A)
    b = tl.exp2(B)
    weight_a = f
    weight_b = g
    bar_a = upstream * epsilon * (a * tl.sum(b, 0) - row_sum)
    bar_b = upstream * epsilon * (b * tl.sum(a, 0) - column_sum)
    if inverse_rho_a > 0:
        share = tl.sum(plan_tile(cost, without_mass(A), B, f, g, LOG2_E / epsilon), 1)
        slope, by_mass = penalty_slopes(share, row_sum, A, a, inverse_rho_a)
        weight_a += slope
        bar_a += upstream * by_mass
    if inverse_rho_b > 0:
        share = tl.sum(plan_tile(cost, A, without_mass(B), f, g, LOG2_E / epsilon), 0)
        slope, by_mass = penalty_slopes(share, column_sum, B, b, inverse_rho_b)
        weight_b += slope
        bar_b += upstream * by_mass
    weight = upstream * (weight_a[:, None] + weight_b[None, :])
    flow = plan * (weight + upstream_linear * tl.where(plan > 0, cost, 0.0))
    bar = (upstream + upstream_linear) * plan - flow / epsilon
    by_row = tl.sum(flow, 1)
    by_column = tl.sum(flow, 0)
    bar_a += by_row
    bar_b += by_column
    bar_f = by_row / epsilon
    bar_g = by_column / epsilon
    if POTENTIALS:
        upstream_f = tl.load(grad_f_ptr + offset_a + rows, mask=mask_a, other=0.0)
        upstream_g = tl.load(grad_g_ptr + offset_b + columns, mask=mask_b, other=0.0)
        bar_f += tl.where(has_pair_a & (skip == 0), upstream_f, 0.0)
        bar_g += tl.where(has_pair_b & (skip == 0), upstream_g, 0.0)
    tl.debug_barrier()
    for reverse_step in range(steps):
        k = steps - 1 - reverse_step
        temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
        relaxation = tl.where((k == 0) | (temperature != epsilon), 1.0, omega)
        beta_a = step_factor(relaxation, temperature, inverse_rho_a)
        beta_b = step_factor(relaxation, temperature, inverse_rho_b)
        f = tl.load(path_f_ptr + (k + 1) * n, mask=mask_a, other=0.0)
        _, softmax = half_step(cost, f, A, temperature, 0)
        flow = softmax * (beta_b * bar_g)[None, :]
        bar_g = (1 - relaxation) * bar_g
        by_row = tl.sum(flow, 1)
        bar_f -= by_row
        bar_a -= temperature * by_row
        bar += flow
        g = tl.load(path_g_ptr + k * m, mask=mask_b, other=0.0)
        _, softmax = half_step(cost, g, B, temperature, 1)
        flow = softmax * (beta_a * bar_f)[:, None]
        bar_f = (1 - relaxation) * bar_f
        by_column = tl.sum(flow, 0)
        bar_g -= by_column
        bar_b -= temperature * by_column
        bar += flow

    bar_a = tl.where(valid_a, tl.where(skip, skipped, bar_a), 0.0)
    bar_b = tl.where(valid_b, tl.where(skip, skipped, bar_b), 0.0)
    tl.store(grad_log_a_ptr + offset_a + rows, bar_a, mask=mask_a)
    tl.store(grad_log_b_ptr + offset_b + columns, bar_b, mask=mask_b)
    bar = tl.where(skip, skipped, tl.where(cost < INFINITY, bar, 0.0))
    bar = tl.where(valid_a[:, None] & valid_b[None, :], bar, 0.0)
    if KIND == GIVEN:
        if NEED_X:
            target = rows[:, None].to(tl.int64) * m + columns[None, :]
            tl.store(grad_x_ptr + target, bar, mask=mask_a[:, None] & mask_b[None, :])
    else:
        self_weight_a = f
        self_weight_b = g
        dot_weight_a = bar
        dot_weight_b = bar
        if KIND == COSINE:
            inner = tl.where(bar != 0, bar * (1 - cost), 0.0)
            self_weight_a = tl.sum(inner, 1)
            self_weight_b = tl.sum(inner, 0)
            dot_weight_a *= tl.load(costs[1][1] + columns, mask=mask_b, other=0.0)[None, :]
            dot_weight_b *= tl.load(costs[0][1] + rows, mask=mask_a, other=0.0)[:, None]
            # Norms of padding may be NaN.
            dot_weight_a = tl.where(bar != 0, dot_weight_a, 0.0)
            dot_weight_b = tl.where(bar != 0, dot_weight_b, 0.0)
        elif KIND == SQEUCLIDEAN:
            self_weight_a = tl.sum(bar, 1)
            self_weight_b = tl.sum(bar, 0)
        DOT: tl.constexpr = (DOT_DTYPE, DOT_PRECISION, BLOCK_G, ROWS)
        if NEED_X:
            sides = grad_x_ptr, log_a_ptr + offset_a, empty, valid_b & (empty == 0)
            multiply_vectors(costs, sides, dot_weight_a, self_weight_a, SPEC, DOT)
        if NEED_Y:
            sides = grad_y_ptr, log_b_ptr + offset_b, empty, valid_a & (empty == 0)
            weight = tl.trans(dot_weight_b)
            multiply_vectors(swap_sides(costs), sides, weight, self_weight_b, SPEC, DOT)
