"""The gradients of token vectors and of given costs, from the potentials of a finished run.

Every program owns some rows of one problem and walks over the columns: cost and plan of a tile are
made again from the vectors and the potentials, used, and forgotten, so no n x m matrix exists and
nothing is added up atomically. For the columns the two sides change places.

    G_ij = P_ij (grad_value + grad_value_linear (1 + (w_i + z_j - C_ij) / epsilon))

where the second bracket is 1 for envelope gradients, and with x' = x / |x|

    cosine       grad x_i = (sum_j G_ij (1 - C_ij) x'_i - sum_j G_ij y'_j) / |x_i|
    sqeuclidean  grad x_i = 2 (sum_j G_ij x_i - sum_j G_ij y_j)
    dot          grad x_i = -sum_j G_ij y_j
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
    operand,
    place,
    plan_tile,
)


@triton.jit
def upstream_tile(plan, cost, upstream, upstream_linear, w, z, epsilon, IMPLICIT: tl.constexpr):
    """What arrives at each entry of the cost; a selection, for upstream may hold anything."""
    if IMPLICIT:
        # Where nothing moves, the cost may be +inf.
        apart = tl.where(plan > 0, w[:, None] + z[None, :] - cost, 0.0)
        grad = plan * (upstream + upstream_linear * (1 + apart / epsilon))
    else:
        grad = plan * (upstream + upstream_linear)
    return tl.where(plan > 0, grad, 0.0)


@triton.jit
def pull_on(grad, cost, some, costs, columns, HOW: tl.constexpr):
    """From the gradient of a tile of the cost: the pull of each column, and that along the rows.

    Where not ``some``, the gradient is 0 and nothing else needs to be a number.
    """
    _, norm_y_ptr, _, _, m = costs[1]
    KIND: tl.constexpr = HOW[0]
    along = tl.sum(grad, 1)
    if KIND == COSINE:
        along = tl.sum(tl.where(some, grad * (1 - cost), 0.0), 1)
        grad *= tl.load(norm_y_ptr + columns, mask=columns < m, other=0.0)[None, :]
        grad = tl.where(some, grad, 0.0)
    return grad, along


@triton.jit
def pull_tile(
    costs,
    columns_of,
    row_zero,
    column_zero,
    A,
    f,
    w,
    epsilon,
    upstream,
    upstream_linear,
    IMPLICIT: tl.constexpr,
    HOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """How some rows are pulled by each column, how strongly along themselves, present columns."""
    log_b_ptr, g_ptr, z_ptr = columns_of
    m = costs[1][4]
    BLOCK_M: tl.constexpr = TILE[1]
    columns = column_zero + tl.arange(0, BLOCK_M)
    B = load_log_mass(log_b_ptr, columns, m)
    g = tl.load(g_ptr + columns, mask=columns < m, other=0.0)
    z = g
    if IMPLICIT:
        z = tl.load(z_ptr + columns, mask=columns < m, other=0.0)
    cost = cost_tile(costs, row_zero, column_zero, HOW, TILE)
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    pull = upstream_tile(plan, cost, upstream, upstream_linear, w, z, epsilon, IMPLICIT)
    pull, along = pull_on(pull, cost, plan > 0, costs, columns, HOW)
    return pull, along, B != -INFINITY


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
    PULL: tl.constexpr,
    PULL_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The gradient of the vectors of one side, BLOCK_N tokens of a problem at a time.

    WHOLE: BLOCK_M columns are all, so G is made once and every part of the vectors pulled with it.
    Otherwise a program makes G tile by tile and pulls with BLOCK_G entries of the vectors.
    """
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if PACKED and ((m < least) | (m > most)):
        return
    grad_ptr += zero_a * dim
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    columns_of = (log_b_ptr + zero_b, g_ptr + zero_b, z_ptr + zero_b)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, 1, 1)
    epsilon = tl.load(epsilon_ptr + problem)
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    for row_zero in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        rows = row_zero + tl.arange(0, BLOCK_N)
        A = load_log_mass(log_a_ptr + zero_a, rows, n)
        f = tl.load(f_ptr + zero_a + rows, mask=rows < n, other=0.0)
        w = f
        if IMPLICIT:
            w = tl.load(w_ptr + zero_a + rows, mask=rows < n, other=0.0)
        if WHOLE:
            columns = tl.arange(0, BLOCK_M)
            pull, along, present = pull_tile(
                costs,
                columns_of,
                row_zero,
                0,
                A,
                f,
                w,
                epsilon,
                upstream,
                upstream_linear,
                IMPLICIT,
                HOW,
                TILE,
            )
            for d0 in range(0, dim, BLOCK_G):
                d = d0 + tl.arange(0, BLOCK_G)
                y = operand(costs[1], costs[2], columns, d, dim, HOW)
                y = tl.where(present[:, None], y, 0.0).to(PULL)
                pulled = tl.dot(pull.to(PULL), y, input_precision=PULL_PRECISION)
                store_gradient(grad_ptr, costs, rows, A, d, along, pulled, HOW)
        else:
            along = tl.zeros((BLOCK_N,), tl.float32)
            pulled = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
            d = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
            for column_zero in range(0, m, BLOCK_M):
                columns = column_zero + tl.arange(0, BLOCK_M)
                pull, more, present = pull_tile(
                    costs,
                    columns_of,
                    row_zero,
                    column_zero,
                    A,
                    f,
                    w,
                    epsilon,
                    upstream,
                    upstream_linear,
                    IMPLICIT,
                    HOW,
                    TILE,
                )
                along += more
                y = operand(costs[1], costs[2], columns, d, dim, HOW)
                y = tl.where(present[:, None], y, 0.0).to(PULL)
                pulled = tl.dot(pull.to(PULL), y, pulled, input_precision=PULL_PRECISION)
            store_gradient(grad_ptr, costs, rows, A, d, along, pulled, HOW)


@triton.jit
def store_gradient(grad_ptr, costs, rows, A, d, along, pulled, HOW: tl.constexpr):
    """The gradient of some entries of some tokens, from the pull of the other side on them."""
    tokens, _, centre_ptr, dim = costs
    _, norm_ptr, scale_ptr, _, n = tokens
    KIND: tl.constexpr = HOW[0]
    SCALED: tl.constexpr = HOW[1]
    WIDE: tl.constexpr = HOW[2]
    grad = -pulled
    if KIND != DOT:
        x = operand(tokens, centre_ptr, rows, d, dim, HOW)
        x = x.to(tl.float32)
        if KIND == COSINE:
            norm = tl.load(norm_ptr + rows, mask=rows < n, other=0.0)
            grad = (along * norm)[:, None] * x - pulled
            if SCALED:
                norm *= tl.load(scale_ptr + rows, mask=rows < n, other=0.0)
            grad *= norm[:, None]
        else:
            grad = 2 * (along[:, None] * x - pulled)
    grad = tl.where((A != -INFINITY)[:, None], grad, 0.0)
    index = rows
    if WIDE:
        index = rows.to(tl.int64)
    inside = (rows < n)[:, None] & (d < dim)[None, :]
    tl.store(grad_ptr + index[:, None] * dim + d[None, :], grad, mask=inside)


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
    """The gradient of a given cost (B, n, m): each entry is read once and written once."""
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    epsilon = tl.load(epsilon_ptr + problem)
    A = load_log_mass(log_a_ptr + problem * n, rows, n)
    B = load_log_mass(log_b_ptr + problem * m, columns, m)
    f = tl.load(f_ptr + problem * n + rows, mask=rows < n, other=0.0)
    g = tl.load(g_ptr + problem * m + columns, mask=columns < m, other=0.0)
    w = f
    z = g
    if IMPLICIT:
        w = tl.load(w_ptr + problem * n + rows, mask=rows < n, other=0.0)
        z = tl.load(z_ptr + problem * m + columns, mask=columns < m, other=0.0)
    offsets = problem * stride_batch + rows[:, None] * stride_n + columns[None, :] * stride_m
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    cost = tl.load(cost_ptr + offsets, mask=inside, other=INFINITY)
    plan = plan_tile(cost, A, B, f, g, LOG2_E / epsilon)
    upstream = tl.load(grad_value_ptr + problem)
    upstream_linear = tl.load(grad_value_linear_ptr + problem)
    grad = upstream_tile(plan, cost, upstream, upstream_linear, w, z, epsilon, IMPLICIT)
    tl.store(grad_ptr + problem * n * m + rows[:, None] * m + columns[None, :], grad, mask=inside)
