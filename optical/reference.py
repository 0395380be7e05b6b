"""Log-domain Sinkhorn in plain PyTorch: the definition that every other implementation must meet.

For each problem of a batch, with cost C (n x m), masses a and b, temperature epsilon and marginal
penalties rho_a and rho_b, of which an infinite one fixes its marginal:

    P_ij           = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)
    rowmin(g)_i    = -epsilon * log sum_j exp(log b_j + (g_j - C_ij) / epsilon)
    columnmin(f)_j = -epsilon * log sum_i exp(log a_i + (f_i - C_ij) / epsilon)
    f <- (1 - omega) f + omega * rho_a / (rho_a + epsilon) * rowmin(g)
    g <- (1 - omega) g + omega * rho_b / (rho_b + epsilon) * columnmin(f)

One iteration updates f and then g, from f = g = 0 unless told otherwise. Sources: Cuturi, "Sinkhorn
Distances" (NeurIPS 2013), algorithm 1, in the logarithmic form of Schmitzer, "Stabilized Sparse
Scaling Algorithms for Entropy Regularized Transport Problems" (arXiv 1610.06519), which also has
the falling temperature; penalties: Chizat, Peyré, Schmitzer and Vialard, "Scaling Algorithms for
Unbalanced Optimal Transport Problems" (arXiv 1607.05816); omega: Thibault, Chizat, Dossal and
Papadakis, "Overrelaxed Sinkhorn-Knopp Algorithm for Regularized Optimal Transport" (arXiv
1711.01851); acceleration: Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations" (SIAM
J. Numer. Anal. 49, 2011).

A line (row or column) of log-mass -inf is absent: its cost is never read as a number, its potential
is 0 and so is its gradient. A cost of +inf forbids the pair. A present line without an allowed pair
is dead: its potential is 0. Every function keeps the dtype it is given, and the outputs of
``sinkhorn`` are differentiable any number of times by ordinary autograd, which is the total
derivative of the run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optical import derivatives
from optical.arguments import Arguments, Gradients, Outputs, Status, given
from optical.iterations import Problems, plan

__all__ = ["apply_plan", "backward", "forward", "plan", "sinkhorn"]


def sinkhorn(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    max_iter: int,
    tol: float = 0.0,
    **options: Any,
) -> Outputs:
    """Solve problems of a given cost (B, n, m), log_a (B, n), log_b (B, m), epsilon (B,).

    ``options`` are fields of ``optical.arguments.Arguments`` by name, ``rho_a`` or ``f0`` say.
    """
    return forward(given(cost, log_a, log_b, epsilon, max_iter, tol=tol, **options))


def forward(arguments: Arguments) -> Outputs:
    """Solve padded problems of a given cost, with every option; ``Outputs`` says what comes back.

    With ``tol > 0`` a problem stops after its first iteration at the final temperature whose row
    sums are within ``tol``, in L1, of those wanted (``Problems.wanted``).
    """
    p = Problems(arguments)
    f, g, n_iter, stopped = p.f0, p.g0, torch.zeros_like(p.live, dtype=torch.int32), ~p.live
    for f, g, counted, stopped in p.iterations():  # noqa: B007
        n_iter = n_iter + counted

    coupling = p.plan(f, g)
    rows, columns = coupling.sum(2), coupling.sum(1)
    excess = p.a.sum(1) * p.b.sum(1) - rows.sum(1)
    value = (rows * f).sum(1) + (columns * g).sum(1) + p.epsilon * excess
    for rho, sums, log_mass in (
        (arguments.rho_a, rows, p.log_a),
        (arguments.rho_b, columns, p.log_b),
    ):
        if rho != math.inf:
            divergence = sums * derivatives.log_ratio(sums, log_mass) - sums + log_mass.exp()
            value = value + rho * divergence.sum(1)
    wanted_rows, wanted_columns = p.wanted(f, g)
    error = (rows - wanted_rows).abs().sum(1) + (columns - wanted_columns).abs().sum(1)
    w, z, residual = f.new_zeros(0), g.new_zeros(0), torch.zeros_like(value)
    if arguments.gradient == "implicit":
        w, z, residual = derivatives.adjoint(p, coupling.detach())

    status = torch.where(stopped, int(Status.CONVERGED), int(Status.MAX_ITER))
    status = torch.where(p.broken | p.infeasible(), int(Status.INFEASIBLE), status)
    status = torch.where(p.empty, int(Status.EMPTY), status)
    broken = p.broken[:, None]
    return Outputs(
        value.masked_fill(p.broken, math.nan),
        (coupling * p.cost).sum((1, 2)).masked_fill(p.broken, math.nan),
        f.masked_fill(broken & (arguments.log_a != -math.inf), math.nan),
        g.masked_fill(broken & (arguments.log_b != -math.inf), math.nan),
        error.masked_fill(p.broken, math.nan),
        n_iter.masked_fill(p.broken, arguments.max_iter),
        status.to(torch.int32),
        w,
        z,
        residual,
    )


def backward(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    arguments: Arguments,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    z: Tensor,
    n_iter: Tensor,
    need_x: bool = True,
    need_y: bool = False,
) -> Gradients:
    """The gradients of a given cost, of log_a and of log_b, written out without autograd.

    Upstream gradients are (B,) for the values and shaped like f and g for the potentials, which
    have one only with ``gradient="unroll"``; f to n_iter are outputs of ``forward``. A problem
    whose outputs are NaN because it could not be read has gradient 0.
    """
    p = Problems(arguments)
    gv, gl = (torch.where(p.live, x, 0.0) for x in (grad_value, grad_value_linear))
    f, g = (torch.where(p.live[:, None], x, 0.0) for x in (f, g))
    if arguments.gradient == "unroll":
        grad_cost, grad_log_a, grad_log_b = derivatives.unrolled(p, gv, gl, grad_f, grad_g)
    else:
        grad_cost, grad_log_a, grad_log_b = derivatives.envelope(p, gv, gl, f, g)
    if arguments.gradient == "implicit":
        more = derivatives.through_the_plan(p, gl, f, g, w, z)
        grad_cost = grad_cost + more[0]
        grad_log_a, grad_log_b = grad_log_a + more[1], grad_log_b + more[2]
    return (grad_cost if need_x else None), None, grad_log_a, grad_log_b


def apply_plan(arguments: Arguments, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """P v (B, n, k) of v (B, m, k), or with ``transpose`` P' v (B, m, k) of v (B, n, k)."""
    coupling = plan(arguments.x, arguments.log_a, arguments.log_b, arguments.epsilon, f, g)
    log_mass = arguments.log_a if transpose else arguments.log_b
    v = torch.where((log_mass != -math.inf)[:, :, None], v, 0.0)
    return (coupling.mT if transpose else coupling) @ v
