"""Sums over the plan of a finished run: the gradients of the masses, and products with vectors.

As in ``gradients``, a program owns some rows of one problem and walks over the columns; for the
columns the two sides change places.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    INFINITY,
    LOG2_E,
    cost_tile,
    extent,
    load_log_mass,
    place,
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
    WALK: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of the log-masses of one side.

    Only with WALK are costs looked at: for the sums of the plan behind implicit gradients, and for
    lines without an allowed pair, of which a penalty wants nothing.
    """
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    epsilon = tl.load(epsilon_ptr + problem)
    scale = LOG2_E / epsilon
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    masses = tl.zeros((BLOCK_M,), tl.float32)
    some = tl.zeros((BLOCK_M,), tl.int32)
    for column_zero in range(0, m, BLOCK_M):
        B = load_log_mass(log_b_ptr + zero_b, column_zero + tl.arange(0, BLOCK_M), m)
        masses += tl.exp2(B)
        some = tl.maximum(some, (B != -INFINITY).to(tl.int32))
    total = tl.sum(masses, 0)
    empty = tl.max(some, 0) == 0
    for row_zero in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_zero + tl.arange(0, BLOCK_N)
        A = load_log_mass(log_a_ptr + zero_a, rows, n)
        f = tl.load(f_ptr + zero_a + rows, mask=rows < n, other=0.0)
        alive = A != -INFINITY
        row_sum = tl.zeros((BLOCK_N,), tl.float32)
        if WALK:
            lowest = tl.full((BLOCK_N,), INFINITY, tl.float32)
            for column_zero in range(0, m, BLOCK_M):
                columns = column_zero + tl.arange(0, BLOCK_M)
                B = load_log_mass(log_b_ptr + zero_b, columns, m)
                g = tl.load(g_ptr + zero_b + columns, mask=columns < m, other=0.0)
                cost = cost_tile(
                    costs, row_zero, column_zero, HOW, (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, 2, 2)
                )
                row_sum += tl.sum(plan_tile(cost, A, B, f, g, scale), 1)
                present = (B != -INFINITY)[None, :]
                lowest = tl.minimum(lowest, tl.min(tl.where(present, cost, INFINITY), 1))
            alive = alive & (lowest < INFINITY)
        a = tl.exp2(A)
        wanted = a
        price = a * f
        if inverse_rho > 0:
            wanted = tl.where(alive, times_exp2(A, -f * inverse_rho * LOG2_E), 0.0)
            price = (a - wanted) / inverse_rho
        grad = upstream * (price + epsilon * (a * total - wanted))
        if IMPLICIT:
            w = tl.load(w_ptr + zero_a + rows, mask=rows < n, other=0.0)
            grad += upstream_linear * row_sum * w * (1 + epsilon * inverse_rho)
        # Potentials that are no number tell of a problem that could not be read.
        grad = tl.where((A != -INFINITY) & (f == f) & (empty == 0), grad, 0.0)
        tl.store(grad_ptr + zero_a + rows, grad, mask=rows < n)


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
    PULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """P v (B, n, width) of v (B, m, width), BLOCK_N rows and BLOCK_G entries of each at a time."""
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    scale = LOG2_E / tl.load(epsilon_ptr + problem)
    d = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    for row_zero in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_zero + tl.arange(0, BLOCK_N)
        A = load_log_mass(log_a_ptr + zero_a, rows, n)
        f = tl.load(f_ptr + zero_a + rows, mask=rows < n, other=0.0)
        product = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
        for column_zero in range(0, m, BLOCK_M):
            columns = column_zero + tl.arange(0, BLOCK_M)
            B = load_log_mass(log_b_ptr + zero_b, columns, m)
            g = tl.load(g_ptr + zero_b + columns, mask=columns < m, other=0.0)
            cost = cost_tile(
                costs, row_zero, column_zero, HOW, (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, 2, 2)
            )
            plan = plan_tile(cost, A, B, f, g, scale)
            offsets = (zero_b + columns).to(tl.int64)[:, None] * width + d[None, :]
            inside = (B != -INFINITY)[:, None] & (d < width)[None, :]
            v = tl.load(v_ptr + offsets, mask=inside, other=0.0)
            product = tl.dot(plan, v, product, input_precision=PULL)
        offsets = (zero_a + rows).to(tl.int64)[:, None] * width + d[None, :]
        tl.store(product_ptr + offsets, product, mask=(rows < n)[:, None] & (d < width)[None, :])
