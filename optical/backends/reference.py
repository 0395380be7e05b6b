"""Log-domain Sinkhorn in plain PyTorch: the definition the other backends are tested against.

For each problem of a batch, with cost C (n x m), masses a and b, temperature epsilon and marginal
penalties rho_a and rho_b, where an infinite penalty fixes the marginal:

    P_ij                 = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)
    row_softmin(g)_i     = -epsilon * log sum_j exp(log b_j + (g_j - C_ij) / epsilon)
    column_softmin(f)_j  = -epsilon * log sum_i exp(log a_i + (f_i - C_ij) / epsilon)
    f <- (1 - omega) f + omega * rho_a / (rho_a + epsilon) * row_softmin(g)
    g <- (1 - omega) g + omega * rho_b / (rho_b + epsilon) * column_softmin(f)

One iteration updates f and then g, starting from f = g = 0 or from given potentials. Sources:
Cuturi, "Sinkhorn Distances" (NeurIPS 2013), algorithm 1, in the log domain and with the decreasing
temperature of Schmitzer, "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport
Problems" (arXiv 1610.06519); penalties: Chizat, Peyré, Schmitzer and Vialard, "Scaling Algorithms
for Unbalanced Optimal Transport Problems" (arXiv 1607.05816); omega: Thibault, Chizat, Dossal and
Papadakis, "Overrelaxed Sinkhorn-Knopp Algorithm for Regularized Optimal Transport" (arXiv
1711.01851); acceleration: Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations" (SIAM
J. Numer. Anal. 49, 2011).

Rows and columns with log-mass -inf are padding: their costs are never used, and their potentials
and gradients are 0. A cost of +inf forbids the pair. A valid row or column without an allowed pair
has potential 0. Every function keeps the dtype of its inputs. Autograd differentiates the outputs
of ``sinkhorn`` any number of times; its result is the total derivative of the iterations run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optical.backends import iterations
from optical.backends.iterations import MaskedProblem
from optical.backends.problem import Gradients, Problem, Solution, Status, cost_problem


def sinkhorn(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    max_iter: int,
    tol: float = 0.0,
    **options: Any,
) -> Solution:
    """Solve padded problems of a given cost; differentiable any number of times by autograd.

    Args:
        cost: (B, n, m).
        log_a, log_b: log-masses (B, n) and (B, m).
        epsilon: (B,) temperatures.
        max_iter, tol, **options: fields of ``optical.backends.Problem``.
    """
    return forward(cost_problem(cost, log_a, log_b, epsilon, max_iter, tol=tol, **options))


def supports(problem: Problem) -> str | None:
    """Return None: the reference solves every problem."""
    return None


def forward(problem: Problem) -> Solution:
    """Solve padded problems of a given cost, with every option.

    With ``tol > 0``, a problem stops after its first iteration at the final temperature whose sums
    differ by at most ``tol``, in L1, from ``MaskedProblem.optimal_sums``. After a plain iteration
    the columns are exact, so the rows suffice. Whether a problem has converged is decided by its
    ``marginal_error``, whatever ended the run.
    """
    masked = MaskedProblem(problem)
    f, g = masked.f0, masked.g0
    n_iter = torch.zeros_like(masked.active, dtype=torch.int32)
    for f, g, counted, _ in masked.iterations():  # noqa: B007
        n_iter = n_iter + counted

    coupling = masked.plan(f, g)
    rows, columns = coupling.sum(2), coupling.sum(1)
    missing = masked.a.sum(1) * masked.b.sum(1) - rows.sum(1)
    value = (rows * f).sum(1) + (columns * g).sum(1) + masked.epsilon * missing
    for rho, sums, log_mass in (
        (problem.rho_a, rows, masked.log_a),
        (problem.rho_b, columns, masked.log_b),
    ):
        if rho != math.inf:
            divergence = sums * log_ratio(sums, log_mass) - sums + log_mass.exp()
            value = value + rho * divergence.sum(1)
    optimal_rows, optimal_columns = masked.optimal_sums(f, g)
    error = (rows - optimal_rows).abs().sum(1) + (columns - optimal_columns).abs().sum(1)
    w, z, residual = f.new_zeros(0), g.new_zeros(0), torch.zeros_like(value)
    if problem.gradient == "implicit":
        w, z, residual = solve_adjoint(masked, coupling.detach())

    malformed, linear = masked.malformed, (coupling * masked.cost).sum((1, 2))
    converged = (error <= problem.tol) & (problem.tol > 0)
    status = torch.where(converged, int(Status.CONVERGED), int(Status.MAX_ITER))
    overflowed = ~torch.stack([value, linear, error]).isfinite().all(0)
    overflowed = overflowed | ~f.isfinite().all(1) | ~g.isfinite().all(1)
    infeasible = malformed | overflowed | masked.infeasible_marginals()
    status = torch.where(infeasible, int(Status.INFEASIBLE), status)
    status = torch.where(masked.empty, int(Status.EMPTY), status)
    return Solution(
        value.masked_fill(malformed, math.nan),
        linear.masked_fill(malformed, math.nan),
        f.masked_fill(malformed[:, None] & (problem.log_a != -math.inf), math.nan),
        g.masked_fill(malformed[:, None] & (problem.log_b != -math.inf), math.nan),
        error.masked_fill(malformed, math.nan),
        n_iter.masked_fill(malformed, problem.max_iter),
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
    problem: Problem,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    z: Tensor,
    n_iter: Tensor,
    need_x: bool = True,
    need_y: bool = False,
) -> Gradients:
    """Compute the gradients of a given cost, log_a and log_b by explicit formulas.

    The gradient of a malformed problem, whose outputs are NaN, is NaN for its valid entries. It is
    0 if all its upstream gradients are 0, since then its outputs were not used.

    Args:
        grad_value, grad_value_linear: (B,) upstream gradients.
        grad_f, grad_g: upstream gradients of the potentials; only with ``gradient="unroll"``.
        problem: padded problems of a given cost.
        f, g, w, z, n_iter: fields of their ``Solution``.
        need_x, need_y: whether the gradients of x and y are needed; the one of y is always None.
    """
    masked = MaskedProblem(problem)
    gv, gl = (torch.where(masked.active, x, 0.0) for x in (grad_value, grad_value_linear))
    f, g = (torch.where(masked.active[:, None], x, 0.0) for x in (f, g))
    if problem.gradient == "unroll":
        grad_cost, grad_log_a, grad_log_b = unrolled_gradients(masked, gv, gl, grad_f, grad_g)
    else:
        grad_cost, grad_log_a, grad_log_b = envelope_gradients(masked, gv, gl, f, g)
    if problem.gradient == "implicit":
        terms = implicit_terms(masked, gl, f, g, w, z)
        grad_cost = grad_cost + terms[0]
        grad_log_a, grad_log_b = grad_log_a + terms[1], grad_log_b + terms[2]
    spoiled = masked.malformed & _is_used(grad_value, grad_value_linear, grad_f, grad_g)
    grad_cost = grad_cost.masked_fill(spoiled[:, None, None] & masked.pairs, math.nan)
    grad_log_a, grad_log_b = (
        grad.masked_fill(spoiled[:, None] & (log_mass != -math.inf), math.nan)
        for grad, log_mass in ((grad_log_a, problem.log_a), (grad_log_b, problem.log_b))
    )
    # Where a problem overflows, the formulas make NaN of padding as well.
    grad_cost = torch.where(masked.pairs, grad_cost, 0.0)
    grad_log_a = torch.where(problem.log_a != -math.inf, grad_log_a, 0.0)
    grad_log_b = torch.where(problem.log_b != -math.inf, grad_log_b, 0.0)
    return (grad_cost if need_x else None), None, grad_log_a, grad_log_b


def _is_used(*upstream: Tensor | None) -> Tensor:
    """(B,) whether any upstream gradient of a problem differs from 0."""
    nonzero = [x != 0 for x in upstream if x is not None]
    return torch.stack([x if x.dim() == 1 else x.any(1) for x in nonzero]).any(0)


def apply_plan(problem: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """Multiply the plan P with v (B, m, k), or its transpose with v (B, n, k).

    Vectors of padding are not used, and products of padding are 0. Those of a malformed problem are
    NaN.
    """
    masked = MaskedProblem(problem)
    coupling = iterations.plan(problem.x, problem.log_a, problem.log_b, problem.epsilon, f, g)
    coupling = coupling.masked_fill(masked.malformed[:, None, None] & masked.pairs, math.nan)
    target, log_mass = problem.log_a, problem.log_b
    if transpose:
        target, log_mass = log_mass, target
    v = torch.where((log_mass != -math.inf)[:, :, None], v, 0.0)
    product = (coupling.mT if transpose else coupling) @ v
    return torch.where((target != -math.inf)[:, :, None], product, 0.0)


def plan(problem: Problem, f: Tensor, g: Tensor, log: bool) -> Tensor:
    """Compute the plan (B, n, m) of the potentials, or its exponent; differentiable by autograd.

    Padding and forbidden pairs are exactly 0 (the exponent: -inf), the valid entries of a malformed
    problem NaN. All is computed in float64 and returned in the dtype of f: in float32, the exponent
    would lose more digits than the potentials have lost.

    Args:
        problem: padded problems of a given cost.
        f, g: potentials (B, n) and (B, m).
        log: return the exponent.
    """
    masked = MaskedProblem(problem)
    factors = (problem.x, problem.log_a, problem.log_b, problem.epsilon, f, g)
    exponent = iterations.log_plan(*(x.double() for x in factors))
    entries = exponent if log else exponent.exp()
    malformed = masked.malformed[:, None, None] & masked.pairs
    return entries.masked_fill(malformed, math.nan).to(f.dtype)


# Blocks of the plan that exchange less than this fraction of their mass count as disconnected.
DISCONNECTED = 1e-9


def envelope_gradients(
    masked: MaskedProblem, gv: Tensor, gl: Tensor, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of cost, log_a and log_b with the plan held fixed.

    ``gv`` and ``gl`` are the upstream gradients of ``value`` and ``value_linear``; only the former
    depends on the masses.
    """
    mass_gradients = []
    for mass, other, optimal, potential, rho in (
        (masked.a, masked.b, masked.optimal_sums(f, g)[0], f, masked.problem.rho_a),
        (masked.b, masked.a, masked.optimal_sums(f, g)[1], g, masked.problem.rho_b),
    ):
        price = mass * potential if rho == math.inf else rho * (mass - optimal)
        missing = mass * other.sum(1, keepdim=True) - optimal
        mass_gradients.append(gv[:, None] * (price + masked.epsilon[:, None] * missing))
    grad_cost = (gv + gl)[:, None, None] * masked.plan(f, g)
    return grad_cost, mass_gradients[0], mass_gradients[1]


def implicit_terms(
    masked: MaskedProblem, gl: Tensor, f: Tensor, g: Tensor, w: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value_linear`` through the plan at the fixed point."""
    coupling, epsilon = masked.plan(f, g), masked.epsilon[:, None]
    scores = (w[:, :, None] + z[:, None, :] - masked.cost) / epsilon[:, :, None]
    stiffness_a = 1 + epsilon / masked.problem.rho_a
    stiffness_b = 1 + epsilon / masked.problem.rho_b
    return (
        gl[:, None, None] * coupling * scores,
        gl[:, None] * coupling.sum(2) * w * stiffness_a,
        gl[:, None] * coupling.sum(1) * z * stiffness_b,
    )


def partial_plan_gradients(
    entries: Tensor, epsilon: Tensor, grad: Tensor, log: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of cost, log_a, log_b, f and g, each with the others held fixed.

    ``grad`` is the gradient of ``entries``, the plan or its logarithm.

    The logarithm is ``(f + g - C) / epsilon + log a + log b``, and -inf where nothing can move.
    """
    if log:
        moved = torch.where(entries == -math.inf, 0.0, grad)
    else:
        moved = torch.where(entries == 0, 0.0, grad * entries)
    rows, columns, inverse = moved.sum(2), moved.sum(1), epsilon.reciprocal()[:, None]
    return -moved * inverse[:, :, None], rows, columns, rows * inverse, columns * inverse


def implicit_plan_gradients(
    problem: Problem, f: Tensor, g: Tensor, grad: Tensor, log: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of cost, log_a, log_b, f and g from that of the plan at the fixed point.

    f and g are functions of the others there: the first three are total derivatives, and those of f
    and g are 0. ``grad`` is the gradient of the plan, or with ``log`` of its logarithm. Computed in
    float64.
    """
    dtype = f.dtype
    floating: dict[str, Any] = {
        name: value.double()
        for name, value in problem._asdict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    masked = MaskedProblem(problem._replace(**floating))
    coupling = masked.plan(f.double(), g.double())
    moved = torch.where(masked.allowed, grad.double(), 0.0) * (1.0 if log else coupling)
    epsilon = masked.epsilon[:, None]
    w, z, _ = solve_adjoint(masked, coupling, moved)
    scores = coupling * (w[:, :, None] + z[:, None, :]) - moved
    grad_cost = scores / epsilon[:, :, None]
    rows = coupling.sum(2) * w * (1 + epsilon / problem.rho_a)
    columns = coupling.sum(1) * z * (1 + epsilon / problem.rho_b)
    spoilt = masked.malformed[:, None]
    valid_a, valid_b = problem.log_a != -math.inf, problem.log_b != -math.inf
    grad_cost = grad_cost.masked_fill(
        spoilt[:, :, None] & valid_a[:, :, None] & valid_b[:, None, :], math.nan
    )
    rows = rows.masked_fill(spoilt & valid_a, math.nan)
    columns = columns.masked_fill(spoilt & valid_b, math.nan)
    moved_by = grad_cost.to(dtype), rows.to(dtype), columns.to(dtype)
    return *moved_by, torch.zeros_like(f), torch.zeros_like(g)


def solve_adjoint(
    masked: MaskedProblem, coupling: Tensor, transported: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve [[diag(r'), P], [P', diag(c')]] [w; z] = [T 1; T' 1] for w and z, where T = P * C.

    ``transported`` replaces T: any matrix that is 0 where a pair is not allowed.

    r' and c' are the row and column sums times 1 + epsilon / rho of their side. w is eliminated and
    the rest is solved densely, scaled by c' ** -1/2 on both sides, which bounds its eigenvalues by
    1. With both marginals fixed, (w - k, z + k) is a solution for every k; the one with
    sum_i r_i w_i = 0 is returned. All is computed in float64: the system consists of sums of the
    plan, and the solution tolerates a plan rounded to float32 but not sums rounded to float32.

    Returns:
        w (B, n), z (B, m) and the relative residual (B,), in the dtype of the plan.
    """
    rho_a, rho_b = masked.problem.rho_a, masked.problem.rho_b
    dtype, coupling = coupling.dtype, coupling.double()
    rows, columns = coupling.sum(2), coupling.sum(1)
    epsilon = masked.epsilon[:, None].double()
    stiff_rows = rows * (1 + epsilon / rho_a)
    stiff_columns = columns * (1 + epsilon / rho_b)
    transported = coupling * masked.cost if transported is None else transported.double()
    by_row, by_column = (_inverse_root(x) for x in (stiff_rows, stiff_columns))
    scaled = by_row[:, :, None] * coupling * by_column[:, None, :]
    system = (by_column > 0).to(scaled).diag_embed() - scaled.mT @ scaled
    right = by_column * transported.sum(1) - _times(scaled.mT, by_row * transported.sum(2))
    # An overflowed system has no solution, and LAPACK turns subnormal numbers into NaN.
    solvable = system.isfinite().all(2).all(1) & right.isfinite().all(1)
    normal = system.abs() >= torch.finfo(system.dtype).tiny
    system = torch.where(normal & solvable[:, None, None], system, 0.0)
    solution = _times(torch.linalg.pinv(system, hermitian=True, rtol=DISCONNECTED), right)
    z = by_column * solution
    w = (transported.sum(2) - _times(coupling, z)) / torch.where(rows > 0, stiff_rows, math.inf)
    if rho_a == rho_b == math.inf:
        total = rows.sum(1, keepdim=True)
        shift = (rows * w).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
        w, z = torch.where(rows > 0, w - shift, 0.0), torch.where(columns > 0, z + shift, 0.0)
    error, size = (right - _times(system, solution)).norm(dim=1), right.norm(dim=1)
    residual = torch.where(size > 0, error / size, 0.0)
    w, z = (x.masked_fill(~solvable[:, None], math.nan).to(dtype) for x in (w, z))
    return w, z, residual.to(dtype)


def unrolled_gradients(
    masked: MaskedProblem, gv: Tensor, gl: Tensor, grad_f: Tensor | None, grad_g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Total derivative of the iterations run: stores all iterates, then sweeps in reverse."""
    f, g = [masked.f0], [masked.g0]
    counts = []
    for next_f, next_g, counted, _ in masked.iterations():
        f.append(next_f)
        g.append(next_g)
        counts.append(counted[:, None])

    bar_cost, bar_log_a, bar_log_b, bar_f, bar_g = _objective_gradients(
        masked, gv, gl, f[-1], g[-1]
    )
    bar_f = bar_f if grad_f is None else bar_f + torch.where(masked.has_pair_a, grad_f, 0.0)
    bar_g = bar_g if grad_g is None else bar_g + torch.where(masked.has_pair_b, grad_g, 0.0)
    for k in reversed(range(len(counts))):
        temperature, counted = masked.temperature(k), counts[k]
        alpha, beta_a, beta_b = masked.factors(k)
        # d g_j = -sum_i pi_ij d f_i + sum_i pi_ij d C_ij - epsilon sum_i pi_ij d log a_i
        scores = masked.column_scores(f[k + 1], temperature)
        pi = torch.where(masked.allowed, scores.softmax(1), 0.0)
        moved = pi * torch.where(counted, beta_b * bar_g, 0.0)[:, None, :]
        bar_g = torch.where(counted, alpha * bar_g, bar_g)
        bar_f = bar_f - moved.sum(2)
        bar_cost = bar_cost + moved
        bar_log_a = bar_log_a - temperature[:, None] * moved.sum(2)
        # d f_i = -sum_j sigma_ij d g_j + sum_j sigma_ij d C_ij - epsilon sum_j sigma_ij d log b_j
        scores = masked.row_scores(g[k], temperature)
        sigma = torch.where(masked.allowed, scores.softmax(2), 0.0)
        moved = sigma * torch.where(counted, beta_a * bar_f, 0.0)[:, :, None]
        bar_f = torch.where(counted, alpha * bar_f, bar_f)
        bar_g = bar_g - moved.sum(1)
        bar_cost = bar_cost + moved
        bar_log_b = bar_log_b - temperature[:, None] * moved.sum(1)
    return bar_cost, bar_log_a, bar_log_b


def _objective_gradients(
    masked: MaskedProblem, gv: Tensor, gl: Tensor, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both values as functions of cost, log_a, log_b, f and g."""
    epsilon, gv_, gl_ = masked.epsilon[:, None], gv[:, None], gl[:, None]
    rho_a, rho_b = masked.problem.rho_a, masked.problem.rho_b
    coupling = masked.plan(f, g)
    rows, columns = coupling.sum(2), coupling.sum(1)
    weight_a, weight_b = f, g
    bar_log_a = gv_ * epsilon * (masked.a * masked.b.sum(1, keepdim=True) - rows)
    bar_log_b = gv_ * epsilon * (masked.b * masked.a.sum(1, keepdim=True) - columns)
    if rho_a != math.inf:
        weight_a = weight_a + rho_a * log_ratio(rows, masked.log_a)
        bar_log_a = bar_log_a + gv_ * rho_a * (masked.a - rows)
    if rho_b != math.inf:
        weight_b = weight_b + rho_b * log_ratio(columns, masked.log_b)
        bar_log_b = bar_log_b + gv_ * rho_b * (masked.b - columns)
    weights = gv_[:, :, None] * (weight_a[:, :, None] + weight_b[:, None, :])
    moved = (weights + gl_[:, :, None] * masked.cost) * coupling
    bar_cost = (gv + gl)[:, None, None] * coupling - moved / epsilon[:, :, None]
    bar_f, bar_g = moved.sum(2) / epsilon, moved.sum(1) / epsilon
    return bar_cost, bar_log_a + moved.sum(2), bar_log_b + moved.sum(1), bar_f, bar_g


def no_second_derivative(ctx: Any, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Raise: the backward, and the forward mode, of the gradients of every backend."""
    raise RuntimeError(
        "optical.sinkhorn has no second derivative; differentiate "
        "optical.backends.reference.sinkhorn, which is plain PyTorch, with autograd instead"
    )


def log_ratio(sums: Tensor, log_mass: Tensor) -> Tensor:
    """Compute log(sums / mass), 0 where the sum is 0; the mass itself may underflow."""
    positive = sums > 0
    return torch.where(positive, sums, 1.0).log() - torch.where(positive, log_mass, 0.0)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]


def _inverse_root(x: Tensor) -> Tensor:
    """Compute x ** -1/2, and 0 where x is 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).rsqrt(), 0.0)
