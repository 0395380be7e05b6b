"""Gradient of the cost with the plan held fixed: one tile of one problem's plan per program.

    grad_cost_ij = (grad_value + grad_value_linear) * plan_ij
    plan_ij      = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)

Registers: one tile. Device memory: the cost is read once and the gradient written once, the least
that a stored cost allows. The potentials come from the forward pass, so nothing is iterated again.
"""

import torch

import triton
import triton.language as tl

BLOCK_N, BLOCK_M = 32, 64

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["n", "m"])
def _sinkhorn_backward_kernel(
    cost_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    f_ptr,
    g_ptr,
    grad_value_ptr,
    grad_value_linear_ptr,
    grad_cost_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = LOG2_E / tl.load(epsilon_ptr + problem)
    upstream = tl.load(grad_value_ptr + problem) + tl.load(grad_value_linear_ptr + problem)
    log_a = tl.load(log_a_ptr + problem * n + rows, mask=rows < n, other=-INFINITY)
    log_b = tl.load(log_b_ptr + problem * m + columns, mask=columns < m, other=-INFINITY)
    f = tl.load(f_ptr + problem * n + rows, mask=rows < n, other=0.0)
    g = tl.load(g_ptr + problem * m + columns, mask=columns < m, other=0.0)

    # Absent pairs are not loaded, so whatever padding holds, their plan is exp2(-inf) = 0.
    present = (log_a > -INFINITY)[:, None] & (log_b > -INFINITY)[None, :]
    rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    offsets = problem * stride_batch + rows[:, None] * stride_n + columns[None, :] * stride_m
    cost = tl.load(cost_ptr + offsets, mask=present, other=INFINITY)
    log_mass = log_a[:, None] + log_b[None, :]
    plan = tl.exp2((f[:, None] + g[None, :] - cost) * scale + log_mass * LOG2_E)
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    target = grad_cost_ptr + problem * n * m + rows[:, None] * m + columns[None, :]
    tl.store(target, upstream * plan, mask=inside)


def sinkhorn_backward(
    cost: torch.Tensor,
    log_a: torch.Tensor,
    log_b: torch.Tensor,
    epsilon: torch.Tensor,
    f: torch.Tensor,
    g: torch.Tensor,
    grad_value: torch.Tensor,
    grad_value_linear: torch.Tensor,
) -> torch.Tensor:
    """Launch one program per tile of each problem and return grad_cost (B, n, m), dense.

    cost: (B, n, m) float32 of any strides, B, n, m > 0; the others are dense float32 vectors, (B,),
    (B, n) or (B, m).
    """
    batch, n, m = cost.shape
    grad_cost = torch.empty(cost.shape, dtype=cost.dtype, device=cost.device)
    grid = (batch, triton.cdiv(n, BLOCK_N), triton.cdiv(m, BLOCK_M))
    with torch.cuda.device_of(cost):
        _sinkhorn_backward_kernel[grid](
            cost,
            log_a,
            log_b,
            epsilon,
            f,
            g,
            grad_value,
            grad_value_linear,
            grad_cost,
            *cost.stride(),
            n,
            m,
            BLOCK_N=BLOCK_N,
            BLOCK_M=BLOCK_M,
            num_warps=4,
        )
    return grad_cost
