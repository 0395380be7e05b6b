"""The plan of a finished run, products of vectors with it, and gradients of the masses.

For products and gradients, as in ``gradients``, a program takes some rows of one problem and loops
over the columns; for results of the columns the sides are exchanged.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    GIVEN,
    INFINITY,
    LOG2_E,
    cost_tile,
    extent,
    load_log_mass,
    load_used_mass,
    locate_cost,
    penalty_gradient,
    plan_tile,
    times_exp2,
)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m"])
def mass_gradient_kernel(
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
    grad_value_ptr,
    grad_value_linear_ptr,
    grad_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    inverse_rho,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    IMPLICIT: tl.constexpr,
    READ_COST: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradient of the log-masses of one side.

    READ_COST: costs are computed, for the row sums of the plan in implicit gradients and for rows
    without an allowed pair, whose target marginal under a penalty is 0.
    """
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    epsilon = tl.load(epsilon_ptr + problem)
    scale = LOG2_E / epsilon
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    masses = tl.zeros((BLOCK_M,), tl.float32)
    any_valid = tl.zeros((BLOCK_M,), tl.int32)
    for column_start in range(0, m, BLOCK_M):
        B = load_log_mass(log_b_ptr + offset_b, column_start + tl.arange(0, BLOCK_M), m)
        masses += tl.exp2(B)
        any_valid = tl.maximum(any_valid, (B != -INFINITY).to(tl.int32))
    total_mass = tl.sum(masses, 0)
    empty = tl.max(any_valid, 0) == 0
    for row_start in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_start + tl.arange(0, BLOCK_N)
        A = load_used_mass(log_a_ptr + offset_a, rows, n, upstream, upstream_linear)
        f = tl.load(f_ptr + offset_a + rows, mask=rows < n, other=0.0)
        has_pair = A != -INFINITY
        row_sum = tl.zeros((BLOCK_N,), tl.float32)
        if READ_COST:
            least_cost = tl.full((BLOCK_N,), INFINITY, tl.float32)
            for column_start in range(0, m, BLOCK_M):
                columns = column_start + tl.arange(0, BLOCK_M)
                B = load_log_mass(log_b_ptr + offset_b, columns, m)
                g = tl.load(g_ptr + offset_b + columns, mask=columns < m, other=0.0)
                cost = cost_tile(
                    costs, row_start, column_start, SPEC, (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, 2, 2)
                )
                row_sum += tl.sum(plan_tile(cost, A, B, f, g, scale), 1)
                valid_columns = (B != -INFINITY)[None, :]
                least_cost = tl.minimum(
                    least_cost, tl.min(tl.where(valid_columns, cost, INFINITY), 1)
                )
            has_pair = has_pair & (least_cost < INFINITY)
        a = tl.exp2(A)
        target = a
        penalty = a * f
        if inverse_rho > 0:
            target = tl.where(has_pair, times_exp2(A, -f * inverse_rho * LOG2_E), 0.0)
            penalty = penalty_gradient(A, a, f, inverse_rho)
            penalty = tl.where(has_pair, penalty, a / inverse_rho)
        grad = upstream * (penalty + epsilon * (a * total_mass - target))
        if IMPLICIT:
            w = tl.load(w_ptr + offset_a + rows, mask=rows < n, other=0.0)
            grad += upstream_linear * row_sum * w * (1 + epsilon * inverse_rho)
        # The potentials of a malformed problem are NaN, which a penalty would hide.
        grad = tl.where(tl.abs(f) < INFINITY, grad, float("nan"))
        grad = tl.where((A != -INFINITY) & (empty == 0), grad, 0.0)
        tl.store(grad_ptr + offset_a + rows, grad, mask=rows < n)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "width"])
def product_kernel(
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
    v_ptr,
    product_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    width,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Compute P v (B, n, width) of v (B, m, width), BLOCK_N rows and BLOCK_G entries at a time."""
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    scale = LOG2_E / tl.load(epsilon_ptr + problem)
    d = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    for row_start in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_start + tl.arange(0, BLOCK_N)
        A = load_log_mass(log_a_ptr + offset_a, rows, n)
        f = tl.load(f_ptr + offset_a + rows, mask=rows < n, other=0.0)
        product = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
        for column_start in range(0, m, BLOCK_M):
            columns = column_start + tl.arange(0, BLOCK_M)
            B = load_log_mass(log_b_ptr + offset_b, columns, m)
            g = tl.load(g_ptr + offset_b + columns, mask=columns < m, other=0.0)
            cost = cost_tile(
                costs, row_start, column_start, SPEC, (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, 2, 2)
            )
            plan = plan_tile(cost, A, B, f, g, scale)
            offsets = (offset_b + columns).to(tl.int64)[:, None] * width + d[None, :]
            mask = (B != -INFINITY)[:, None] & (d < width)[None, :]
            v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
            product = tl.dot(plan, v, product, input_precision=DOT_PRECISION)
        product = tl.where((A != -INFINITY)[:, None], product, 0.0)
        offsets = (offset_a + rows).to(tl.int64)[:, None] * width + d[None, :]
        tl.store(product_ptr + offsets, product, mask=(rows < n)[:, None] & (d < width)[None, :])


@triton.jit(do_not_specialize=["n", "m"])
def plan_kernel(
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
    out_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    LOG: tl.constexpr,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a tile of the plan (B, n, m) of padded problems, or with LOG of its logarithm.

    The exponent is computed in float64 and rounded once: potentials and costs that nearly cancel
    would lose more digits in float32 than they have. The kernel waits for memory, so the few
    operations per entry cost little even where float64 is slow.
    """
    tl.static_assert(not PACKED, "the plans of packed problems differ in shape")
    problem = tl.program_id(0).to(tl.int64)
    row_start = tl.program_id(1) * BLOCK_N
    column_start = tl.program_id(2) * BLOCK_M
    rows = row_start + tl.arange(0, BLOCK_N)
    columns = column_start + tl.arange(0, BLOCK_M)
    log_a = tl.load(log_a_ptr + problem * n + rows, mask=rows < n, other=-INFINITY)
    log_b = tl.load(log_b_ptr + problem * m + columns, mask=columns < m, other=-INFINITY)
    f = tl.load(f_ptr + problem * n + rows, mask=rows < n, other=0.0).to(tl.float64)
    g = tl.load(g_ptr + problem * m + columns, mask=columns < m, other=0.0).to(tl.float64)
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    if KIND == GIVEN:
        offsets = rows[:, None].to(tl.int64) * stride_n + columns[None, :].to(tl.int64) * stride_m
        cost = tl.load(x_ptr + problem * stride_batch + offsets, mask=inside, other=INFINITY)
    else:
        tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
        sizes = (stride_batch, stride_n, stride_m, n, m, dim)
        costs = locate_cost(tokens, sizes, problem, problem * n, problem * m, KIND)
        SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
        TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, 2, 2)
        cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
    unit = tl.full((), 1.0 if LOG else LOG2_E, tl.float64)
    scale = unit / tl.load(epsilon_ptr + problem).to(tl.float64)
    exponent = ((f[:, None] + g[None, :]) - cost.to(tl.float64)) * scale
    exponent += (log_a.to(tl.float64) * unit)[:, None] + (log_b.to(tl.float64) * unit)[None, :]
    valid = (log_a != -INFINITY)[:, None] & (log_b != -INFINITY)[None, :]
    exponent = tl.where(valid, exponent, -INFINITY)
    result = exponent.to(tl.float32)
    if not LOG:
        # exp2 of the rounded exponent, times exp2 of what was rounded off.
        rest = (exponent - result.to(tl.float64)).to(tl.float32)
        rest = tl.where(tl.abs(result) < INFINITY, rest, 0.0)
        result = tl.exp2(result) * (1 + rest / LOG2_E)
    target = problem * n * m + rows[:, None].to(tl.int64) * m + columns[None, :]
    tl.store(out_ptr + target, result, mask=inside)
