"""Log-domain Sinkhorn in plain PyTorch: the definition that every other implementation must meet.

For each problem of a batch, with cost C (n x m), marginals a and b and temperature epsilon:

    plan_ij = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)
    f_i     = -epsilon * log sum_j exp(log b_j + (g_j - C_ij) / epsilon)
    g_j     = -epsilon * log sum_i exp(log a_i + (f_i - C_ij) / epsilon)

One iteration updates f and then g, from f = g = 0: Cuturi, "Sinkhorn Distances" (NeurIPS 2013),
algorithm 1, in the logarithmic form of Schmitzer, "Stabilized Sparse Scaling Algorithms for
Entropy Regularized Transport Problems" (arXiv 1610.06519).

A marginal of log-weight -inf is absent: its cost is never read as a number, its potential is 0 and
so is its gradient. A cost of +inf between present entries forbids the pair. Every function keeps
the dtype it is given and is differentiable by ordinary autograd.
"""

import math

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def sinkhorn(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, max_iter: int, tol: float = 0.0
) -> Outputs:
    """Solve a batch of problems: cost (B, n, m), log_a (B, n), log_b (B, m), epsilon (B,).

    Returns value, value_linear, f, g, marginal_error and n_iter. With ``tol > 0`` a problem stops
    after its first iteration whose row sums are within ``tol`` of ``a`` in L1; with ``tol = 0``
    every problem runs ``max_iter`` iterations.
    """
    readable, allowed = _readable(cost, log_a, log_b)
    eps = epsilon[:, None, None]
    a, b = log_a.exp(), log_b.exp()
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    row_alive = allowed.any(2)
    present = (log_a > -math.inf).any(1) & (log_b > -math.inf).any(1)
    stopped = ~present
    n_iter = torch.zeros_like(stopped, dtype=torch.int32)

    for iteration in range(max_iter):
        score = log_b[:, None, :] + (g[:, None, :] - readable) / eps
        f_next = -epsilon[:, None] * _lse(score, allowed, 2)
        if tol > 0 and iteration > 0:
            # The f half-step measures the row sums of the iterate it starts from.
            rows = torch.where(row_alive, a * ((f - f_next) / epsilon[:, None]).exp(), 0.0)
            stopped = stopped | ((rows - a).abs().sum(1) <= tol)
        f = torch.where(stopped[:, None], f, f_next)
        score = log_a[:, :, None] + (f[:, :, None] - readable) / eps
        g_next = -epsilon[:, None] * _lse(score, allowed, 1)
        g = torch.where(stopped[:, None], g, g_next)
        n_iter = n_iter + ~stopped

    coupling = plan(cost, log_a, log_b, epsilon, f, g)
    rows, columns = coupling.sum(2), coupling.sum(1)
    value_linear = (coupling * readable).sum((1, 2))
    excess = a.sum(1) * b.sum(1) - coupling.sum((1, 2))
    value = (rows * f).sum(1) + (columns * g).sum(1) + epsilon * excess
    marginal_error = (rows - a).abs().sum(1) + (columns - b).abs().sum(1)
    return value, value_linear, f, g, torch.where(present, marginal_error, 0.0), n_iter


def plan(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, f: Tensor, g: Tensor
) -> Tensor:
    """The coupling (B, n, m) of the potentials, exactly 0 at absent and forbidden pairs."""
    readable, allowed = _readable(cost, log_a, log_b)
    exponent = (f[:, :, None] + g[:, None, :] - readable) / epsilon[:, None, None]
    exponent = exponent + log_a[:, :, None] + log_b[:, None, :]
    return exponent.masked_fill(~allowed, -math.inf).exp()


def sinkhorn_backward(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    grad_value: Tensor,
    grad_value_linear: Tensor,
) -> Tensor:
    """Gradient of both values with respect to the cost, with the plan held fixed (the envelope)."""
    upstream = (grad_value + grad_value_linear)[:, None, None]
    return upstream * plan(cost, log_a, log_b, epsilon, f, g)


def _readable(cost: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """The cost with 0 wherever it must not be read, and the mask of pairs that may carry mass."""
    present = (log_a > -math.inf)[:, :, None] & (log_b > -math.inf)[:, None, :]
    allowed = present & (cost != math.inf)
    return torch.where(allowed, cost, 0.0), allowed


def _lse(score: Tensor, allowed: Tensor, dim: int) -> Tensor:
    """log sum exp of the allowed scores along dim, and 0 where none is allowed."""
    alive = allowed.any(dim)
    # A logsumexp of nothing but -inf has a NaN gradient, so a dead line is given zeros to read.
    score = score.masked_fill(~allowed, -math.inf).masked_fill(~alive.unsqueeze(dim), 0.0)
    return torch.where(alive, torch.logsumexp(score, dim), 0.0)
