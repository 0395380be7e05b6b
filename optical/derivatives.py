"""The derivatives of the operator, written out in plain PyTorch, for given costs.

gv and gl are the gradients (B,) that arrive at ``value`` and ``value_linear``; the functions return
what these give to the cost, to log a and to log b.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optical.iterations import Problems

# Parts of a plan that exchange less than this share of their mass do not move one another.
DISCONNECTED = 1e-9


def envelope(
    p: Problems, gv: Tensor, gl: Tensor, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both values with the plan held fixed."""
    return (gv + gl)[:, None, None] * p.plan(f, g), *envelope_of_masses(p, gv, f, g)


def envelope_of_masses(p: Problems, gv: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
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
    p: Problems, gl: Tensor, f: Tensor, g: Tensor, w: Tensor, z: Tensor
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


def adjoint(p: Problems, coupling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def unrolled(
    p: Problems, gv: Tensor, gl: Tensor, grad_f: Tensor | None, grad_g: Tensor | None
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
