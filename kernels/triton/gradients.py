"""Gradients of token vectors and of given costs, from the potentials of a finished run.

A program takes some rows of one problem and loops over the columns. Cost and plan of a tile are
recomputed from the vectors and the potentials, used and discarded, so no n x m matrix is stored
and no atomic additions are needed. For the gradient of the columns the sides are exchanged.

    G_ij = P_ij (grad_value + grad_value_linear (1 + (w_i + z_j - C_ij) / epsilon))

The second bracket is 1 for envelope gradients. With x' = x / |x|

    cosine       grad x_i = (sum_j G_ij (1 - C_ij) x'_i - sum_j G_ij y'_j) / |x_i|
    sqeuclidean  grad x_i = 2 (sum_j G_ij x_i - sum_j G_ij y_j)
    dot          grad x_i = -sum_j G_ij y_j

Each has two parts: ``self_weight``, the factor of x_i, and ``dot_sum``, a product of
``dot_weight`` (n, m) with the vectors of the columns.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    COSINE,
    DOT,
    INFINITY,
    LOG2_E,
    cost_tile,
    extent,
    load_log_mass,
    load_used_mass,
    load_vectors,
    locate_cost,
    plan_tile,
)


@triton.jit
def cost_gradient_tile(
    plan, cost, upstream, upstream_linear, w, z, epsilon, IMPLICIT: tl.constexpr
):
    """Compute a tile of G, the gradient of the cost.

    It selects instead of multiplying by 0 because upstream gradients may be non-finite.
    """
    if IMPLICIT:
        # The cost may be +inf where the plan is 0.
        implicit_term = tl.where(plan > 0, w[:, None] + z[None, :] - cost, 0.0)
        grad = plan * (upstream + upstream_linear * (1 + implicit_term / epsilon))
    else:
        grad = plan * (upstream + upstream_linear)
    return tl.where(plan != 0, grad, 0.0)


@triton.jit
def vector_weights(grad, cost, costs, columns, SPEC: tl.constexpr):
    """From a tile of G, return the weight of each column's vector and of each row's own vector.

    Where G is 0, cost and norms may be NaN.
    """
    _, norm_y_ptr, _, _, m = costs[1]
    KIND: tl.constexpr = SPEC[0]
    self_weight = tl.sum(grad, 1)
    if KIND == COSINE:
        allowed = grad != 0
        self_weight = tl.sum(tl.where(allowed, grad * (1 - cost), 0.0), 1)
        grad *= tl.load(norm_y_ptr + columns, mask=columns < m, other=0.0)[None, :]
        grad = tl.where(allowed, grad, 0.0)
    return grad, self_weight


@triton.jit
def vector_weight_tile(
    costs,
    column_side,
    row_start,
    column_start,
    A,
    f,
    w,
    epsilon,
    upstream,
    upstream_linear,
    IMPLICIT: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the weights of ``vector_weights`` for one tile, and which columns are valid."""
    log_b_ptr, g_ptr, z_ptr = column_side
    m = costs[1][4]
    BLOCK_M: tl.constexpr = TILE[1]
    columns = column_start + tl.arange(0, BLOCK_M)
    B = load_log_mass(log_b_ptr, columns, m)
    g = tl.load(g_ptr + columns, mask=columns < m, other=0.0)
    z = g
    if IMPLICIT:
        z = tl.load(z_ptr + columns, mask=columns < m, other=0.0)
    cost = cost_tile(costs, row_start, column_start, SPEC, TILE)
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    dot_weight = cost_gradient_tile(plan, cost, upstream, upstream_linear, w, z, epsilon, IMPLICIT)
    dot_weight, self_weight = vector_weights(dot_weight, cost, costs, columns, SPEC)
    return dot_weight, self_weight, B != -INFINITY


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "least", "most"])
def vector_gradient_kernel(
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
    z_ptr,
    grad_value_ptr,
    grad_value_linear_ptr,
    grad_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    least,
    most,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    IMPLICIT: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Compute the gradient of the vectors of one side, BLOCK_N tokens of a problem at a time.

    WHOLE: BLOCK_M spans all columns, so G is computed once and multiplied with every part of the
    vectors. Otherwise a program computes G tile by tile for BLOCK_G entries of the vectors.
    """
    problem = tl.program_id(0).to(tl.int64)
    offset_a, n = extent(cu_a_ptr, problem, n, PACKED)
    offset_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if PACKED and ((m < least) | (m > most)):
        return
    grad_ptr += offset_a * dim
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND)
    column_side = (log_b_ptr + offset_b, g_ptr + offset_b, z_ptr + offset_b)
    SPEC: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, 1, 1)
    epsilon = tl.load(epsilon_ptr + problem)
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    for row_start in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_start + tl.arange(0, BLOCK_N)
        A = load_used_mass(log_a_ptr + offset_a, rows, n, upstream, upstream_linear)
        f = tl.load(f_ptr + offset_a + rows, mask=rows < n, other=0.0)
        w = f
        if IMPLICIT:
            w = tl.load(w_ptr + offset_a + rows, mask=rows < n, other=0.0)
        if WHOLE:
            columns = tl.arange(0, BLOCK_M)
            dot_weight, self_weight, valid_columns = vector_weight_tile(
                costs,
                column_side,
                row_start,
                0,
                A,
                f,
                w,
                epsilon,
                upstream,
                upstream_linear,
                IMPLICIT,
                SPEC,
                TILE,
            )
            for d0 in range(0, dim, BLOCK_G):
                d = d0 + tl.arange(0, BLOCK_G)
                y = load_vectors(costs[1], costs[2], columns, d, dim, SPEC)
                y = tl.where(valid_columns[:, None], y, 0.0).to(DOT_DTYPE)
                dot_sum = tl.dot(dot_weight.to(DOT_DTYPE), y, input_precision=DOT_PRECISION)
                store_gradient(grad_ptr, costs, rows, A, d, self_weight, dot_sum, SPEC)
        else:
            self_weight = tl.zeros((BLOCK_N,), tl.float32)
            dot_sum = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
            d = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
            for column_start in range(0, m, BLOCK_M):
                columns = column_start + tl.arange(0, BLOCK_M)
                dot_weight, tile_self_weight, valid_columns = vector_weight_tile(
                    costs,
                    column_side,
                    row_start,
                    column_start,
                    A,
                    f,
                    w,
                    epsilon,
                    upstream,
                    upstream_linear,
                    IMPLICIT,
                    SPEC,
                    TILE,
                )
                self_weight += tile_self_weight
                y = load_vectors(costs[1], costs[2], columns, d, dim, SPEC)
                y = tl.where(valid_columns[:, None], y, 0.0).to(DOT_DTYPE)
                dot_sum = tl.dot(
                    dot_weight.to(DOT_DTYPE), y, dot_sum, input_precision=DOT_PRECISION
                )
            store_gradient(grad_ptr, costs, rows, A, d, self_weight, dot_sum, SPEC)


@triton.jit
def store_gradient(grad_ptr, costs, rows, A, d, self_weight, dot_sum, SPEC: tl.constexpr):
    """Store BLOCK_G entries of the gradient of some tokens from their weights."""
    tokens, _, centre_ptr, dim = costs
    _, norm_ptr, scale_ptr, _, n = tokens
    KIND: tl.constexpr = SPEC[0]
    SCALED: tl.constexpr = SPEC[1]
    WIDE: tl.constexpr = SPEC[2]
    grad = -dot_sum
    if KIND != DOT:
        x = load_vectors(tokens, centre_ptr, rows, d, dim, SPEC)
        x = x.to(tl.float32)
        if KIND == COSINE:
            norm = tl.load(norm_ptr + rows, mask=rows < n, other=0.0)
            grad = (self_weight * norm)[:, None] * x - dot_sum
            if SCALED:
                norm *= tl.load(scale_ptr + rows, mask=rows < n, other=0.0)
            grad *= norm[:, None]
        else:
            grad = 2 * (self_weight[:, None] * x - dot_sum)
    grad = tl.where((A != -INFINITY)[:, None], grad, 0.0)
    index = rows
    if WIDE:
        index = rows.to(tl.int64)
    mask = (rows < n)[:, None] & (d < dim)[None, :]
    tl.store(grad_ptr + index[:, None] * dim + d[None, :], grad, mask=mask)


@triton.jit(do_not_specialize=["n", "m"])
def cost_gradient_kernel(
    cost_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    f_ptr,
    g_ptr,
    w_ptr,
    z_ptr,
    grad_value_ptr,
    grad_value_linear_ptr,
    grad_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    IMPLICIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute the gradient of a given cost (B, n, m), one read and one write per entry."""
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    epsilon = tl.load(epsilon_ptr + problem)
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    A = load_used_mass(log_a_ptr + problem * n, rows, n, upstream, upstream_linear)
    B = load_log_mass(log_b_ptr + problem * m, columns, m)
    f = tl.load(f_ptr + problem * n + rows, mask=rows < n, other=0.0)
    g = tl.load(g_ptr + problem * m + columns, mask=columns < m, other=0.0)
    w = f
    z = g
    if IMPLICIT:
        w = tl.load(w_ptr + problem * n + rows, mask=rows < n, other=0.0)
        z = tl.load(z_ptr + problem * m + columns, mask=columns < m, other=0.0)
    offsets = problem * stride_batch + rows[:, None] * stride_n + columns[None, :] * stride_m
    mask = (rows < n)[:, None] & (columns < m)[None, :]
    cost = tl.load(cost_ptr + offsets, mask=mask, other=INFINITY)
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    grad = cost_gradient_tile(plan, cost, upstream, upstream_linear, w, z, epsilon, IMPLICIT)
    tl.store(grad_ptr + problem * n * m + rows[:, None] * m + columns[None, :], grad, mask=mask)
