"""``unrolled`` for problems larger than a chip's registers: launch by launch, no matrix in memory.

Of every half-step vectors stay: the potentials it read, f, the minima it found, s, and later what
arrives at these in the reverse sweep, v. With them its plan can be made again at any tile,

    pi_ij = a_i exp((f_i + s_j - C_ij) / T)        each column sums to 1

and the gradient of the cost is that of the last plan plus the sum over the iterations of
pi_ij v_j + sigma_ij v_i, sigma being pi with the sides exchanged. Every kernel owns rows of one
side and walks over the other; for the columns the two sides change places.

A minimum in float32 leaves an exponent of a thousand without the digits that make columns sum to 1.
So s stands as two numbers, an anchor, the minimum one iteration earlier, and what was missing.
"""

import triton
import triton.language as tl
from optical.kernels.gradients import pull_on, store_gradient
from optical.kernels.streamed.unrolled_replay import ELSEWHERE, LIVE, pace, scores
from optical.kernels.tiles import (
    GIVEN,
    INFINITY,
    LOG2_E,
    cost_tile,
    extent,
    load_log_mass,
    operand,
    place,
    plan_tile,
    temperature_of,
)


@triton.jit
def last_plan(cost, A, B, f, g, epsilon, weights, upstream, upstream_linear):
    """The plan at the end of the run, and what arrives at the logarithm of each entry."""
    weight_a, weight_b = weights
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    weight = upstream * (weight_a[:, None] + weight_b[None, :])
    moved = plan * (weight + upstream_linear * tl.where(plan > 0, cost, 0.0))
    return plan, tl.where(plan > 0, moved, 0.0)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "k", "lines_a", "lines_b"])
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
    other_missing_ptr,
    arrived_ptr,
    other_arrived_ptr,
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
    lines_a,
    lines_b,
    inverse_rho,
    omega,
    BEGIN: tl.constexpr,
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
    """What arrives at the potentials of one side before iteration k, or with BEGIN at the last.

    Of what has arrived the next half-step back takes its part, and leaves a part with COLUMNS to
    the iteration before.
    """
    problem = tl.program_id(0).to(tl.int64)
    state = tl.load(state_ptr + problem)
    steps = tl.load(steps_ptr + problem)
    if state == ELSEWHERE:
        return
    if BEGIN:
        k = steps
    elif k >= steps:
        return
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = temperature_of(epsilon_ptr, problem)
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    step = k.to(tl.int64)
    # The rows of an iteration were done before its columns, whose plan has the new potentials.
    own_step = step if COLUMNS or BEGIN else step + 1
    path_ptr += own_step * lines_a + zero_a
    other_path_ptr += step * lines_b + zero_b
    other_anchor_ptr += step * lines_b + zero_b
    other_missing_ptr += step * lines_b + zero_b
    other_arrived_ptr += step * lines_b + zero_b
    temperature = epsilon
    if not BEGIN:
        temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
    # Where the own side's minima stand that this arrives at next.
    to = k - 1 if COLUMNS else k
    more = (to >= 0) & (to < steps)
    _hot, stays, share = pace(epsilon, annealing_ptr, tl.where(more, to, 0), omega, inverse_rho)
    arrived_ptr += to.to(tl.int64) * lines_a + zero_a
    for row_zero in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_zero + tl.arange(0, BLOCK_N)
        inside = rows < n
        A = load_log_mass(log_a_ptr + zero_a, rows, n)
        live = (A != -INFINITY) & (state == LIVE)
        f = tl.load(path_ptr + rows, mask=inside, other=0.0)
        own_weight = f
        if BEGIN:
            own_weight = tl.load(weight_ptr + zero_a + rows, mask=inside, other=0.0)
        total = tl.zeros((BLOCK_N,), tl.float32)
        lowest = tl.full((BLOCK_N,), INFINITY, tl.float32)
        for column_zero in range(0, m, BLOCK_M):
            columns = column_zero + tl.arange(0, BLOCK_M)
            within = columns < m
            B = load_log_mass(log_b_ptr + zero_b, columns, m)
            cost = cost_tile(costs, row_zero, column_zero, HOW, TILE)
            if BEGIN:
                g = tl.load(other_path_ptr + columns, mask=within, other=0.0)
                weight = tl.load(other_weight_ptr + zero_b + columns, mask=within, other=0.0)
                _plan, moved = last_plan(
                    cost, A, B, f, g, epsilon, (own_weight, weight), upstream, upstream_linear
                )
                lowest = tl.minimum(
                    lowest, tl.min(tl.where((B != -INFINITY)[None, :], cost, INFINITY), 1)
                )
            else:
                anchor = tl.load(other_anchor_ptr + columns, mask=within, other=0.0)
                missing = tl.load(other_missing_ptr + columns, mask=within, other=0.0)
                v = tl.load(other_arrived_ptr + columns, mask=within, other=0.0)
                allowed = live[:, None] & (B != -INFINITY)[None, :] & (cost < INFINITY)
                log_mass = A[:, None] - missing[None, :]
                score = scores(cost, allowed, f[:, None], anchor[None, :], log_mass, temperature)
                moved = tl.exp2(score) * v[None, :]
            total += tl.sum(moved, 1)
        log_total = total
        if BEGIN:
            bar = total / epsilon
            if POTENTIALS:
                arriving = tl.load(grad_f_ptr + zero_a + rows, mask=inside, other=0.0)
                bar += tl.where(lowest < INFINITY, arriving, 0.0)
        else:
            bar = tl.load(bar_ptr + zero_a + rows, mask=inside, other=0.0) - total
            log_total = -temperature * total
        bar = tl.where(live, bar, 0.0)
        grad = tl.load(grad_log_ptr + zero_a + rows, mask=inside, other=0.0)
        grad = tl.where(live, grad + log_total, 0.0)
        tl.store(grad_log_ptr + zero_a + rows, grad, mask=inside)
        tl.store(arrived_ptr + rows, share * bar, mask=inside & more)
        tl.store(bar_ptr + zero_a + rows, tl.where(more, stays * bar, bar), mask=inside)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "lines_a", "lines_b"])
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
    missing_ptr,
    other_missing_ptr,
    arrived_ptr,
    other_arrived_ptr,
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
    lines_a,
    lines_b,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    PULL: tl.constexpr,
    PULL_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    """The gradient of the vectors of one side, or of a given cost, all iterations at each tile."""
    problem = tl.program_id(0).to(tl.int64)
    state = tl.load(state_ptr + problem)
    steps = tl.load(steps_ptr + problem)
    if state == ELSEWHERE:
        return
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    if KIND == GIVEN:
        grad_ptr += problem * n * m
    else:
        grad_ptr += zero_a * dim
    epsilon = temperature_of(epsilon_ptr, problem)
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    wide_a, wide_b = lines_a.to(tl.int64), lines_b.to(tl.int64)
    path_ptr += zero_a
    other_path_ptr += zero_b
    anchor_ptr += zero_a
    other_anchor_ptr += zero_b
    missing_ptr += zero_a
    other_missing_ptr += zero_b
    arrived_ptr += zero_a
    other_arrived_ptr += zero_b
    d = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    for row_zero in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_zero + tl.arange(0, BLOCK_N)
        inside = rows < n
        A = load_log_mass(log_a_ptr + zero_a, rows, n)
        live = (A != -INFINITY) & (state == LIVE)
        own_weight = tl.load(weight_ptr + zero_a + rows, mask=inside, other=0.0)
        along = tl.zeros((BLOCK_N,), tl.float32)
        pulled = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
        for column_zero in range(0, m, BLOCK_M):
            columns = column_zero + tl.arange(0, BLOCK_M)
            within = columns < m
            B = load_log_mass(log_b_ptr + zero_b, columns, m)
            present = (B != -INFINITY) & (state == LIVE)
            cost = cost_tile(costs, row_zero, column_zero, HOW, TILE)
            allowed = live[:, None] & present[None, :] & (cost < INFINITY)
            f = tl.load(path_ptr + steps * wide_a + rows, mask=inside, other=0.0)
            g = tl.load(other_path_ptr + steps * wide_b + columns, mask=within, other=0.0)
            weight = tl.load(other_weight_ptr + zero_b + columns, mask=within, other=0.0)
            plan, moved = last_plan(
                cost, A, B, f, g, epsilon, (own_weight, weight), upstream, upstream_linear
            )
            grad = (upstream + upstream_linear) * plan - moved / epsilon
            for k in range(steps):
                temperature = tl.maximum(epsilon, tl.load(annealing_ptr + k))
                own, other = k * wide_a, k * wide_b
                # The columns of an iteration see the rows' new potentials, the rows their old ones.
                own_path = own if COLUMNS else own + wide_a
                other_path = other + wide_b if COLUMNS else other
                f = tl.load(path_ptr + own_path + rows, mask=inside, other=0.0)
                g = tl.load(other_path_ptr + other_path + columns, mask=within, other=0.0)
                anchor_a = tl.load(anchor_ptr + own + rows, mask=inside, other=0.0)
                anchor_b = tl.load(other_anchor_ptr + other + columns, mask=within, other=0.0)
                missing_a = tl.load(missing_ptr + own + rows, mask=inside, other=0.0)
                missing_b = tl.load(other_missing_ptr + other + columns, mask=within, other=0.0)
                v_a = tl.load(arrived_ptr + own + rows, mask=inside, other=0.0)
                v_b = tl.load(other_arrived_ptr + other + columns, mask=within, other=0.0)
                log_mass = A[:, None] - missing_b[None, :]
                score = scores(cost, allowed, f[:, None], anchor_b[None, :], log_mass, temperature)
                grad += tl.exp2(score) * v_b[None, :]
                log_mass = B[None, :] - missing_a[:, None]
                score = scores(cost, allowed, g[None, :], anchor_a[:, None], log_mass, temperature)
                grad += tl.exp2(score) * v_a[:, None]
            grad = tl.where(allowed, grad, 0.0)
            if KIND == GIVEN:
                target = rows[:, None].to(tl.int64) * m + columns[None, :]
                tl.store(grad_ptr + target, grad, mask=inside[:, None] & within[None, :])
            else:
                pull, more = pull_on(grad, cost, allowed, costs, columns, HOW)
                along += more
                y = operand(costs[1], costs[2], columns, d, dim, HOW)
                y = tl.where(present[:, None], y, 0.0).to(PULL)
                pulled = tl.dot(pull.to(PULL), y, pulled, input_precision=PULL_PRECISION)
        if KIND != GIVEN:
            A = tl.where(live, A, -INFINITY)
            store_gradient(grad_ptr, costs, rows, A, d, along, pulled, HOW)
