"""Batched Sinkhorn, one program per problem, the whole plan on chip.

    plan_ij = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)

Inside, logarithms are binary and potentials are in units of epsilon / log2(e): F, G, S = C in those
units, A = log2 a, B = log2 b, so that one exp2 replaces an exp and a division.

An *exact* iteration is the pair of log-sum-exps of the definition; it spends one exp2 per entry and
half-step. It leaves K = exp2(F + G - S + A + B), and a *scaling* iteration then gets the same
iterates from multiplications alone (Schmitzer, arXiv 1610.06519, section 3):

    u_i = a_i / sum_j K_ij v_j,    v_j = b_j / sum_i u_i K_ij,    F + log2 u, G + log2 v

K is rebuilt by an exact iteration when a scaling has drifted past 2^+-30. After an exact iteration
no exponent exceeds A or B, so nothing overflows; should a sum underflow below 2^-100 all the same,
the scaling iteration is discarded and done again exactly.

Registers: K (n x m) and a few vectors. Device memory: the cost is read once, and once more for each
rebuilding of K; it is read through predicates, so padding is never a number.
"""

import torch

import triton
import triton.language as tl

MAX_TOKENS = 128

LOG2_E = tl.constexpr(1.4426950408889634)
DRIFT = tl.constexpr(2.0**30)
WEAK = tl.constexpr(2.0**-100)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _load_log_mass(log_mass_ptr, size, zero, BLOCK: tl.constexpr):
    """log2 of the masses, -inf outside the problem."""
    index = tl.arange(0, BLOCK) + zero
    return tl.load(log_mass_ptr + index, mask=index < size, other=-INFINITY) * LOG2_E


@triton.jit
def _load_cost(
    cost_ptr, stride_n, stride_m, A, B, zero, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The cost, read where both sides are present and +inf elsewhere, as where it is forbidden."""
    rows = tl.arange(0, BLOCK_N) + zero
    columns = tl.arange(0, BLOCK_M) + zero
    present = (A > -INFINITY)[:, None] & (B > -INFINITY)[None, :]
    offsets = rows[:, None] * stride_n + columns[None, :] * stride_m
    return tl.load(cost_ptr + offsets, mask=present, other=INFINITY)


@triton.jit
def _half_step(score, axis: tl.constexpr):
    """-log2 sum exp2 of the scores along the axis, and 0 where every one of them is -inf."""
    peak = tl.max(score, axis)
    alive = peak > -INFINITY
    peak = tl.where(alive, peak, 0.0)
    total = tl.sum(tl.exp2(score - tl.expand_dims(peak, axis)), axis)
    return tl.where(alive, -(peak + tl.log2(tl.where(alive, total, 1.0))), 0.0)


@triton.jit
def _drifted(scaling):
    return (tl.max(scaling, 0) > DRIFT) | (tl.min(scaling, 0) < 1 / DRIFT)


@triton.jit(do_not_specialize=["n", "m", "max_iter"])
def _sinkhorn_forward_kernel(
    cost_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    value_ptr,
    value_linear_ptr,
    f_ptr,
    g_ptr,
    marginal_error_ptr,
    n_iter_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    max_iter,
    tol,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    cost_ptr += problem * stride_batch
    log_a_ptr += problem * n
    log_b_ptr += problem * m
    epsilon = tl.load(epsilon_ptr + problem)
    scale = LOG2_E / epsilon

    # Vectors cost as many registers per thread as the tile has rows there, so only these live on.
    F = tl.zeros((BLOCK_N,), tl.float32)
    G = tl.zeros((BLOCK_M,), tl.float32)
    a = tl.exp2(_load_log_mass(log_a_ptr, n, 0, BLOCK_N))
    b = tl.exp2(_load_log_mass(log_b_ptr, m, 0, BLOCK_M))
    u = F + 1.0
    v = G + 1.0
    K = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    iteration = 0
    empty = False
    exact = True
    running = True
    while running:
        if exact:
            # Addresses that seem to depend on the loop stay out of the registers between rebuilds.
            zero = tl.multiple_of(tl.minimum(iteration, 0), 16)
            A = _load_log_mass(log_a_ptr, n, zero, BLOCK_N)
            B = _load_log_mass(log_b_ptr, m, zero, BLOCK_M)
            S = _load_cost(cost_ptr, stride_n, stride_m, A, B, zero, BLOCK_N, BLOCK_M) * scale
            row_alive = tl.min(S, 1) < INFINITY
            column_alive = tl.min(S, 0) < INFINITY
            F += tl.log2(u)
            G += tl.log2(v)
            F_next = _half_step((B + G)[None, :] - S, 1)
            row_sum = tl.where(row_alive, a * tl.exp2(F - F_next), 0.0)
            close = (tol > 0) & (iteration > 0) & (tl.sum(tl.abs(row_sum - a), 0) <= tol)
            empty = (tl.max(A, 0) == -INFINITY) | (tl.max(B, 0) == -INFINITY)
            stop = close | empty | (iteration >= max_iter)
            F = tl.where(stop, F, F_next)
            G = tl.where(stop, G, _half_step((A + F)[:, None] - S, 0))
            K = tl.exp2((A + F)[:, None] + (B + G)[None, :] - S)
            u = tl.full((BLOCK_N,), 1.0, tl.float32)
            v = tl.full((BLOCK_M,), 1.0, tl.float32)
            # A line that may carry mass, but whose K is lost below float32, needs exact steps.
            exact = tl.min(tl.where(row_alive, tl.sum(K, 1), 1.0), 0) < WEAK
            exact = exact | (tl.min(tl.where(column_alive, tl.sum(K, 0), 1.0), 0) < WEAK)
        else:
            # Here only a dead line sums to 0; its scaling stays 1.
            Kv = tl.sum(K * v[None, :], 1)
            Kv = tl.where(Kv == 0, INFINITY, Kv)
            weak = tl.min(Kv, 0) < WEAK
            # The f half-step measures the row sums u * Kv of the iterate it starts from.
            row_sum = tl.where(Kv == INFINITY, 0.0, u * Kv)
            close = (tol > 0) & (tl.sum(tl.abs(row_sum - a), 0) <= tol)
            u_next = tl.where(Kv == INFINITY, 1.0, a / Kv)
            Ku = tl.sum(K * u_next[:, None], 0)
            Ku = tl.where(Ku == 0, INFINITY, Ku)
            weak = weak | (tl.min(Ku, 0) < WEAK)
            v_next = tl.where(Ku == INFINITY, 1.0, b / Ku)
            stop = close & (weak == 0)
            keep = stop | weak
            u = tl.where(keep, u, u_next)
            v = tl.where(keep, v, v_next)
            exact = weak | _drifted(u) | _drifted(v)
            iteration -= tl.where(weak, 1, 0)
        iteration += tl.where(stop, 0, 1)
        running = (iteration < max_iter) & (stop == 0)

    plan = K * u[:, None] * v[None, :]
    row_sum = tl.sum(plan, 1)
    column_sum = tl.sum(plan, 0)
    # K holds the cost too, S = A + B + F + G - log2 K, so nothing is read from memory again.
    transported = -tl.sum(tl.sum(tl.where(K > 0, plan * tl.log2(K), 0.0), 1), 0)
    transported += tl.sum(tl.where(row_sum > 0, row_sum * (tl.log2(a) + F), 0.0), 0)
    transported += tl.sum(tl.where(column_sum > 0, column_sum * (tl.log2(b) + G), 0.0), 0)
    F += tl.log2(u)
    G += tl.log2(v)
    total = tl.sum(row_sum, 0)
    excess = tl.sum(a, 0) * tl.sum(b, 0) - total
    dual = tl.sum(row_sum * F, 0) + tl.sum(column_sum * G, 0)
    error = tl.sum(tl.abs(row_sum - a), 0) + tl.sum(tl.abs(column_sum - b), 0)
    tl.store(value_ptr + problem, dual / scale + epsilon * excess)
    tl.store(value_linear_ptr + problem, transported / scale)
    tl.store(marginal_error_ptr + problem, tl.where(empty, 0.0, error))
    tl.store(n_iter_ptr + problem, iteration)
    tl.store(f_ptr + problem * n + rows, F / scale, mask=rows < n)
    tl.store(g_ptr + problem * m + columns, G / scale, mask=columns < m)


def tile(n: int, m: int, aligned: bool) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_M and the number of warps, chosen from the shape and the strides alone.

    Triton lays a tile out by how its memory can be read. Rows that start at multiples of 16 entries
    get four columns per thread; otherwise a thread holds a column, and twice the warps are needed
    to keep its vectors, one entry per row of the thread, in registers.
    """
    block_n, block_m = (max(16, triton.next_power_of_2(size)) for size in (n, m))
    warps = block_n * block_m // (1024 if aligned else 512)
    return block_n, block_m, max(1, min(16, warps))


def sinkhorn_forward(
    cost: torch.Tensor,
    log_a: torch.Tensor,
    log_b: torch.Tensor,
    epsilon: torch.Tensor,
    max_iter: int,
    tol: float,
) -> tuple[torch.Tensor, ...]:
    """Launch one program per problem.

    cost: (B, n, m) float32 of any strides, n and m at most ``MAX_TOKENS``, B, n, m > 0; log_a
    (B, n), log_b (B, m) and epsilon (B,) float32, dense. Returns value, value_linear, f, g,
    marginal_error and n_iter (int32), like ``optical.reference.sinkhorn``.
    """
    batch, n, m = cost.shape
    value, value_linear = torch.empty_like(epsilon), torch.empty_like(epsilon)
    f, g = torch.empty_like(log_a), torch.empty_like(log_b)
    marginal_error = torch.empty_like(epsilon)
    n_iter = torch.empty(batch, dtype=torch.int32, device=cost.device)
    aligned = cost.stride(2) == 1 and cost.stride(1) % 16 == 0
    block_n, block_m, num_warps = tile(n, m, aligned)
    with torch.cuda.device_of(cost):
        _sinkhorn_forward_kernel[(batch,)](
            cost,
            log_a,
            log_b,
            epsilon,
            value,
            value_linear,
            f,
            g,
            marginal_error,
            n_iter,
            *cost.stride(),
            n,
            m,
            max_iter,
            tol,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            num_warps=num_warps,
        )
    return value, value_linear, f, g, marginal_error, n_iter
