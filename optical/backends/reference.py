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

from optical.backends.iterations import MaskedProblem, plan
from optical.backends.problem import Gradients, Problem, Solution, Status, given


def sinkhorn(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    max_iter: int,
    tol: float = 0.0,
    **options: Any,
) -> Solution:
    """Solve problems of a given cost (B, n, m), log_a (B, n), log_b (B, m), epsilon (B,).

    ``options`` are fields of ``optical.backends.problem.Problem`` by name, ``rho_a`` or ``f0`` say.
    """
    return forward(given(cost, log_a, log_b, epsilon, max_iter, tol=tol, **options))


def forward(arguments: Problem) -> Solution:
    """Solve padded problems of a given cost, with every option; ``Solution`` says what comes back.

    With ``tol > 0`` a problem stops after its first iteration at the final temperature whose row
    sums are within ``tol``, in L1, of those wanted (``MaskedProblem.wanted``).
    """
    p = MaskedProblem(arguments)
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
            divergence = sums * log_ratio(sums, log_mass) - sums + log_mass.exp()
            value = value + rho * divergence.sum(1)
    wanted_rows, wanted_columns = p.wanted(f, g)
    error = (rows - wanted_rows).abs().sum(1) + (columns - wanted_columns).abs().sum(1)
    w, z, residual = f.new_zeros(0), g.new_zeros(0), torch.zeros_like(value)
    if arguments.gradient == "implicit":
        w, z, residual = solve_adjoint(p, coupling.detach())

    status = torch.where(stopped, int(Status.CONVERGED), int(Status.MAX_ITER))
    status = torch.where(p.broken | p.infeasible(), int(Status.INFEASIBLE), status)
    status = torch.where(p.empty, int(Status.EMPTY), status)
    broken = p.broken[:, None]
    return Solution(
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
    arguments: Problem,
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
    p = MaskedProblem(arguments)
    gv, gl = (torch.where(p.live, x, 0.0) for x in (grad_value, grad_value_linear))
    f, g = (torch.where(p.live[:, None], x, 0.0) for x in (f, g))
    if arguments.gradient == "unroll":
        grad_cost, grad_log_a, grad_log_b = unrolled_gradients(p, gv, gl, grad_f, grad_g)
    else:
        grad_cost, grad_log_a, grad_log_b = envelope_gradient(p, gv, gl, f, g)
    if arguments.gradient == "implicit":
        more = through_the_plan(p, gl, f, g, w, z)
        grad_cost = grad_cost + more[0]
        grad_log_a, grad_log_b = grad_log_a + more[1], grad_log_b + more[2]
    return (grad_cost if need_x else None), None, grad_log_a, grad_log_b


def apply_plan(arguments: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """P v (B, n, k) of v (B, m, k), or with ``transpose`` P' v (B, m, k) of v (B, n, k)."""
    coupling = plan(arguments.x, arguments.log_a, arguments.log_b, arguments.epsilon, f, g)
    log_mass = arguments.log_a if transpose else arguments.log_b
    v = torch.where((log_mass != -math.inf)[:, :, None], v, 0.0)
    return (coupling.mT if transpose else coupling) @ v


# Parts of a plan that exchange less than this share of their mass do not move one another.
DISCONNECTED = 1e-9


def envelope_gradient(
    p: MaskedProblem, gv: Tensor, gl: Tensor, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both values with the plan held fixed."""
    return (gv + gl)[:, None, None] * p.plan(f, g), *envelope_of_masses(p, gv, f, g)


def envelope_of_masses(p: MaskedProblem, gv: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The part of log a and log b in ``envelope``: only ``value`` moves with the masses."""
    gradients = []
    for mass, other, wanted, potential, rho in (
        (p.a, p.b, p.wanted(f, g)[0], f, p.arguments.rho_a),
        (p.b, p.a, p.wanted(f, g)[1], g, p.arguments.rho_b),
    ):
        price = mass * potential if rho == math.inf else rho * (mass - wanted)
        excess = mass * other.sum(1, keepdim=True) - wanted
        gradients.append(gv[:, None] * (price + p.epsilon[:, None] * excess))
    return gradients[0], gradients[1]


def through_the_plan(
    p: MaskedProblem, gl: Tensor, f: Tensor, g: Tensor, w: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``value_linear`` gains because the plan of a fixed point moves with cost and masses."""
    coupling, epsilon = p.plan(f, g), p.epsilon[:, None]
    scores = (w[:, :, None] + z[:, None, :] - p.cost) / epsilon[:, :, None]
    stiff_a, stiff_b = 1 + epsilon / p.arguments.rho_a, 1 + epsilon / p.arguments.rho_b
    return (
        gl[:, None, None] * coupling * scores,
        gl[:, None] * coupling.sum(2) * w * stiff_a,
        gl[:, None] * coupling.sum(1) * z * stiff_b,
    )


def solve_adjoint(p: MaskedProblem, coupling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w, z and the residual of [[diag(r'), P], [P', diag(c')]] [w; z] = [(P * C) 1; (P * C)' 1].

    r' and c' are the row and column sums times 1 + epsilon / rho of their side. w is eliminated
    and the rest solved densely, scaled by c' on both sides, which bounds its eigenvalues by 1. With
    both marginals fixed (w - k, z + k) is a solution too; the one with sum_i r_i w_i = 0 is taken.
    Everything is in float64: a plan rounded to float32 still determines the solution well, because
    the system is built of its sums alone, but sums rounded to float32 do not.
    """
    dtype, coupling = coupling.dtype, coupling.double()
    rows, columns = coupling.sum(2), coupling.sum(1)
    epsilon = p.epsilon[:, None].double()
    stiff_rows = rows * (1 + epsilon / p.arguments.rho_a)
    stiff_columns = columns * (1 + epsilon / p.arguments.rho_b)
    moved = coupling * p.cost
    by_row, by_column = (_inverse_root(x) for x in (stiff_rows, stiff_columns))
    scaled = by_row[:, :, None] * coupling * by_column[:, None, :]
    system = (by_column > 0).to(scaled).diag_embed() - scaled.mT @ scaled
    right = by_column * moved.sum(1) - _times(scaled.mT, by_row * moved.sum(2))
    # What overflowed has no solution, and of subnormal numbers LAPACK makes NaN.
    solvable = system.isfinite().all(2).all(1) & right.isfinite().all(1)
    normal = system.abs() >= torch.finfo(system.dtype).tiny
    system = torch.where(normal & solvable[:, None, None], system, 0.0)
    solution = _times(torch.linalg.pinv(system, hermitian=True, rtol=DISCONNECTED), right)
    z = by_column * solution
    w = (moved.sum(2) - _times(coupling, z)) / torch.where(rows > 0, stiff_rows, math.inf)
    if p.arguments.rho_a == p.arguments.rho_b == math.inf:
        total = rows.sum(1, keepdim=True)
        shift = (rows * w).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
        w, z = torch.where(rows > 0, w - shift, 0.0), torch.where(columns > 0, z + shift, 0.0)
    error, size = (right - _times(system, solution)).norm(dim=1), right.norm(dim=1)
    residual = torch.where(size > 0, error / size, 0.0)
    w, z = (x.masked_fill(~solvable[:, None], math.nan).to(dtype) for x in (w, z))
    return w, z, residual.to(dtype)


def unrolled_gradients(
    p: MaskedProblem, gv: Tensor, gl: Tensor, grad_f: Tensor | None, grad_g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The total derivative of the run: its iterates are stored, then swept in reverse."""
    f, g = [p.f0], [p.g0]
    counts = []
    for f_next, g_next, counted, _ in p.iterations():
        f.append(f_next)
        g.append(g_next)
        counts.append(counted[:, None])

    epsilon, gv_, gl_ = p.epsilon[:, None], gv[:, None], gl[:, None]
    coupling = p.plan(f[-1], g[-1])
    rows, columns = coupling.sum(2), coupling.sum(1)
    weight_a, weight_b = f[-1], g[-1]
    bar_log_a = gv_ * epsilon * (p.a * p.b.sum(1, keepdim=True) - rows)
    bar_log_b = gv_ * epsilon * (p.b * p.a.sum(1, keepdim=True) - columns)
    rho_a, rho_b = p.arguments.rho_a, p.arguments.rho_b
    if rho_a != math.inf:
        weight_a = weight_a + rho_a * log_ratio(rows, p.log_a)
        bar_log_a = bar_log_a + gv_ * rho_a * (p.a - rows)
    if rho_b != math.inf:
        weight_b = weight_b + rho_b * log_ratio(columns, p.log_b)
        bar_log_b = bar_log_b + gv_ * rho_b * (p.b - columns)
    weights = gv_[:, :, None] * (weight_a[:, :, None] + weight_b[:, None, :])
    moved = (weights + gl_[:, :, None] * p.cost) * coupling
    bar_cost = (gv + gl)[:, None, None] * coupling - moved / epsilon[:, :, None]
    bar_f, bar_g = moved.sum(2) / epsilon, moved.sum(1) / epsilon
    bar_log_a, bar_log_b = bar_log_a + moved.sum(2), bar_log_b + moved.sum(1)
    bar_f = bar_f if grad_f is None else bar_f + torch.where(p.alive_a, grad_f, 0.0)
    bar_g = bar_g if grad_g is None else bar_g + torch.where(p.alive_b, grad_g, 0.0)

    for k in reversed(range(len(counts))):
        temperature, counted = p.temperature(k), counts[k]
        alpha, beta_a, beta_b = p.factors(k)
        # d g_j = -sum_i pi_ij d f_i + sum_i pi_ij d C_ij - epsilon sum_i pi_ij d log a_i
        pi = torch.where(p.allowed, p.column_scores(f[k + 1], temperature).softmax(1), 0.0)
        moved = pi * torch.where(counted, beta_b * bar_g, 0.0)[:, None, :]
        bar_g = torch.where(counted, alpha * bar_g, bar_g)
        bar_f = bar_f - moved.sum(2)
        bar_cost = bar_cost + moved
        bar_log_a = bar_log_a - temperature[:, None] * moved.sum(2)
        # d f_i = -sum_j sigma_ij d g_j + sum_j sigma_ij d C_ij - epsilon sum_j sigma_ij d log b_j
        sigma = torch.where(p.allowed, p.row_scores(g[k], temperature).softmax(2), 0.0)
        moved = sigma * torch.where(counted, beta_a * bar_f, 0.0)[:, :, None]
        bar_f = torch.where(counted, alpha * bar_f, bar_f)
        bar_g = bar_g - moved.sum(1)
        bar_cost = bar_cost + moved
        bar_log_b = bar_log_b - temperature[:, None] * moved.sum(1)
    return bar_cost, bar_log_a, bar_log_b


def log_ratio(sums: Tensor, log_mass: Tensor) -> Tensor:
    """log(sums / mass), and 0 where nothing is transported; the mass may be too small a number."""
    some = sums > 0
    return torch.where(some, sums, 1.0).log() - torch.where(some, log_mass, 0.0)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]


def _inverse_root(x: Tensor) -> Tensor:
    """x ** -1/2, and 0 where x is 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).rsqrt(), 0.0)
