"""The total derivative of a finite run, one program per problem, cost and gradient in registers.

The run is repeated and its potentials written down, n + m numbers per iteration; then it is swept
in reverse. With pi and sigma the plans of a half-step, each column or row of which sums to 1, a
step back is

    d g_j = -sum_i pi_ij d f_i + sum_i pi_ij d C_ij,    d f_i = -sum_j sigma_ij d g_j + ...

(``optical.derivatives`` has all terms). In the end the gradient of the cost, still in registers,
pulls at the vectors.
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
    load_log_mass,
    log_ratio,
    log_sum,
    operand,
    place,
    plan_tile,
    swapped,
    temperature_of,
)


@triton.jit
def scores(cost, potential, log_mass, temperature, axis: tl.constexpr):
    """What a half-step sums up: along axis 1 over the columns, of which the vectors are."""
    potential = tl.expand_dims(potential, 1 - axis)
    score = (potential - cost) * (LOG2_E / temperature) + tl.expand_dims(log_mass, 1 - axis)
    return tl.where(cost < INFINITY, score, -INFINITY)


@triton.jit
def half_step(cost, potential, log_mass, temperature, axis: tl.constexpr):
    """The minimum along the axis (0 on a line without an allowed pair), and its softmax.

    Exponents of a thousand have lost digits that their differences still have, so both are formed
    again around the minimum.
    """
    scale = LOG2_E / temperature
    total, alive = log_sum(scores(cost, potential, log_mass, temperature, axis), axis)
    rough = tl.where(alive, -total / scale, 0.0)
    moved = tl.expand_dims(potential, 1 - axis) + tl.expand_dims(rough, axis)
    score = (moved - cost) * scale + tl.expand_dims(log_mass, 1 - axis)
    share = tl.exp2(tl.where(cost < INFINITY, score, -INFINITY))
    total = tl.where(alive, tl.sum(share, axis), 1.0)
    return rough - tl.log2(total) / scale, share / tl.expand_dims(total, axis)


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
    PULL: tl.constexpr,
    PULL_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
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
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    path_f_ptr += zero_a * (max_iter + 1) + rows
    path_g_ptr += zero_b * (max_iter + 1) + columns
    if KIND == GIVEN:
        grad_x_ptr += problem * n * m
    else:
        grad_x_ptr += zero_a * dim
        grad_y_ptr += zero_b * dim
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    inside_a = rows < n
    inside_b = columns < m
    A = load_log_mass(log_a_ptr + zero_a, rows, n)
    B = load_log_mass(log_b_ptr + zero_b, columns, m)
    present_a = A != -INFINITY
    present_b = B != -INFINITY
    found = tl.load(f_ptr + zero_a + rows, mask=inside_a, other=0.0)
    # Potentials that are no number tell of a problem that could not be read.
    broken = tl.max(tl.where(found == found, 0, 1), 0) > 0
    empty = tl.max(present_a.to(tl.int32), 0) * tl.max(present_b.to(tl.int32), 0) == 0
    dead = broken | empty
    steps = tl.where(dead, 0, tl.load(n_iter_ptr + problem))
    epsilon = temperature_of(epsilon_ptr, problem)
    cost = cost_tile(costs, 0, 0, HOW, (BLOCK_N, BLOCK_M, BLOCK_D, PART, WARPS_N, WARPS_M))
    cost = tl.where(present_a[:, None] & present_b[None, :], cost, INFINITY)
    alive_a = tl.min(cost, 1) < INFINITY
    alive_b = tl.min(cost, 0) < INFINITY
    f = tl.zeros((BLOCK_N,), tl.float32)
    g = tl.zeros((BLOCK_M,), tl.float32)
    if START:
        f = tl.load(f0_ptr + zero_a + rows, mask=inside_a, other=0.0)
        g = tl.load(g0_ptr + zero_b + columns, mask=inside_b, other=0.0)
        f = tl.where(alive_a, f, 0.0)
        g = tl.where(alive_b, g, 0.0)
    tl.store(path_f_ptr, f, mask=inside_a)
    tl.store(path_g_ptr, g, mask=inside_b)
    for k in range(steps):
        temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
        relaxation = tl.where((k == 0) | (temperature != epsilon), 1.0, omega)
        moved, _ = half_step(cost, g, B, temperature, 1)
        f = (1 - relaxation) * f + relaxation / (1 + temperature * inverse_rho_a) * moved
        moved_b, _ = half_step(cost, f, A, temperature, 0)
        g = (1 - relaxation) * g + relaxation / (1 + temperature * inverse_rho_b) * moved_b
        tl.store(path_f_ptr + (k + 1) * n, f, mask=inside_a)
        tl.store(path_g_ptr + (k + 1) * m, g, mask=inside_b)

    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    upstream = tl.where(dead, 0.0, upstream)
    upstream_linear = tl.where(dead, 0.0, upstream_linear)
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
        weight_a += log_ratio(row_sum, A) / inverse_rho_a
        bar_a += upstream * (a - row_sum) / inverse_rho_a
    if inverse_rho_b > 0:
        weight_b += log_ratio(column_sum, B) / inverse_rho_b
        bar_b += upstream * (b - column_sum) / inverse_rho_b
    weight = upstream * (weight_a[:, None] + weight_b[None, :])
    moved = plan * (weight + upstream_linear * tl.where(plan > 0, cost, 0.0))
    bar = (upstream + upstream_linear) * plan - moved / epsilon
    by_row = tl.sum(moved, 1)
    by_column = tl.sum(moved, 0)
    bar_a += by_row
    bar_b += by_column
    bar_f = by_row / epsilon
    bar_g = by_column / epsilon
    if POTENTIALS:
        more_f = tl.load(grad_f_ptr + zero_a + rows, mask=inside_a, other=0.0)
        more_g = tl.load(grad_g_ptr + zero_b + columns, mask=inside_b, other=0.0)
        bar_f += tl.where(alive_a & (dead == 0), more_f, 0.0)
        bar_g += tl.where(alive_b & (dead == 0), more_g, 0.0)
    tl.debug_barrier()
    for back in range(steps):
        k = steps - 1 - back
        temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
        relaxation = tl.where((k == 0) | (temperature != epsilon), 1.0, omega)
        beta_a = relaxation / (1 + temperature * inverse_rho_a)
        beta_b = relaxation / (1 + temperature * inverse_rho_b)
        f = tl.load(path_f_ptr + (k + 1) * n, mask=inside_a, other=0.0)
        _, share = half_step(cost, f, A, temperature, 0)
        moved = share * (beta_b * bar_g)[None, :]
        bar_g = (1 - relaxation) * bar_g
        by_row = tl.sum(moved, 1)
        bar_f -= by_row
        bar_a -= temperature * by_row
        bar += moved
        g = tl.load(path_g_ptr + k * m, mask=inside_b, other=0.0)
        _, share = half_step(cost, g, B, temperature, 1)
        moved = share * (beta_a * bar_f)[:, None]
        bar_f = (1 - relaxation) * bar_f
        by_column = tl.sum(moved, 0)
        bar_g -= by_column
        bar_b -= temperature * by_column
        bar += moved

    bar_a = tl.where(present_a & (dead == 0), bar_a, 0.0)
    bar_b = tl.where(present_b & (dead == 0), bar_b, 0.0)
    tl.store(grad_log_a_ptr + zero_a + rows, bar_a, mask=inside_a)
    tl.store(grad_log_b_ptr + zero_b + columns, bar_b, mask=inside_b)
    bar = tl.where((cost < INFINITY) & (dead == 0), bar, 0.0)
    if KIND == GIVEN:
        if NEED_X:
            target = rows[:, None].to(tl.int64) * m + columns[None, :]
            tl.store(grad_x_ptr + target, bar, mask=inside_a[:, None] & inside_b[None, :])
    else:
        along_a = f
        along_b = g
        pull_a = bar
        pull_b = bar
        if KIND == COSINE:
            near = tl.where(cost < INFINITY, bar * (1 - cost), 0.0)
            along_a = tl.sum(near, 1)
            along_b = tl.sum(near, 0)
            pull_a *= tl.load(costs[1][1] + columns, mask=inside_b, other=0.0)[None, :]
            pull_b *= tl.load(costs[0][1] + rows, mask=inside_a, other=0.0)[:, None]
            # The norm of an absent token may be no number.
            pull_a = tl.where((cost < INFINITY) & (dead == 0), pull_a, 0.0)
            pull_b = tl.where((cost < INFINITY) & (dead == 0), pull_b, 0.0)
        elif KIND == SQEUCLIDEAN:
            along_a = tl.sum(bar, 1)
            along_b = tl.sum(bar, 0)
        for d0 in range(0, dim, BLOCK_G):
            d = d0 + tl.arange(0, BLOCK_G)
            if NEED_X:
                y = operand(costs[1], costs[2], columns, d, dim, HOW)
                y = tl.where(present_b[:, None] & (dead == 0), y, 0.0).to(PULL)
                pulled = tl.dot(pull_a.to(PULL), y, input_precision=PULL_PRECISION)
                store_gradient(
                    grad_x_ptr, costs, rows, tl.where(dead, -INFINITY, A), d, along_a, pulled, HOW
                )
            if NEED_Y:
                x = operand(costs[0], costs[2], rows, d, dim, HOW)
                x = tl.where(present_a[:, None] & (dead == 0), x, 0.0).to(PULL)
                pulled = tl.dot(tl.trans(pull_b).to(PULL), x, input_precision=PULL_PRECISION)
                store_gradient(
                    grad_y_ptr,
                    swapped(costs),
                    columns,
                    tl.where(dead, -INFINITY, B),
                    d,
                    along_b,
                    pulled,
                    HOW,
                )
