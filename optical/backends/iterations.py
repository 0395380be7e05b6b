"""Masked problems and Sinkhorn iterations in plain PyTorch.

``optical.backends.reference`` has the formulas; its solution and its gradients share this code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from optical.backends.problem import Problem

# With both marginals fixed, total masses may differ by this fraction of the larger one.
MASS_TOLERANCE = 1e-3


def plan(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, f: Tensor, g: Tensor
) -> Tensor:
    """Compute the plan (B, n, m) of the potentials, exactly 0 for padding and forbidden pairs."""
    return log_plan(cost, log_a, log_b, epsilon, f, g).exp()


def log_plan(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, f: Tensor, g: Tensor
) -> Tensor:
    """Compute the exponent (B, n, m) of the plan, -inf for padding and forbidden pairs."""
    valid = (log_a != -math.inf)[:, :, None] & (log_b != -math.inf)[:, None, :]
    allowed = valid & (cost != math.inf)
    cost = torch.where(allowed, cost, 0.0)
    exponent = (f[:, :, None] + g[:, None, :] - cost) / epsilon[:, None, None]
    exponent = exponent + log_a[:, :, None] + log_b[:, None, :]
    return exponent.masked_fill(~allowed, -math.inf)


def times_exp(log_mass: Tensor, exponent: Tensor) -> Tensor:
    """Compute exp(log_mass) * exp(exponent), of which one may underflow and the other overflow.

    Only the part of the exponent beyond the range of exp is added to ``log_mass``, since the sum
    shares the rounding error of the logarithm.
    """
    excess = (exponent - 80).clamp(min=0)
    return (log_mass + excess).exp() * (exponent - excess).exp()


class MaskedProblem:
    """Padded problems of a given cost whose masked entries are replaced by neutral values.

    Attributes:
        problem: the problems as given.
        empty: (B,) whether all rows or all columns are padding.
        malformed: (B,) whether an input is NaN or out of range; such problems get NaN outputs.
        active: (B,) whether a problem is neither. Others get zero mass, so iterating them is a
            no-op.
        log_a, log_b, a, b: log-masses and masses, -inf and 0 for padding and inactive problems.
        epsilon: (B,) temperatures, 1 for inactive problems.
        cost: (B, n, m), 0 where a pair is not allowed.
        pairs: (B, n, m) whether row and column are valid.
        allowed: (B, n, m) whether they are and the cost is not +inf.
        has_pair_a, has_pair_b: (B, n) and (B, m), whether a row or column has an allowed pair.
        f0, g0: initial potentials, 0 for rows and columns without an allowed pair.
    """

    def __init__(self, problem: Problem) -> None:
        x, log_a, log_b = problem.x, problem.log_a, problem.log_b
        valid_a, valid_b = log_a != -math.inf, log_b != -math.inf
        pairs = valid_a[:, :, None] & valid_b[:, None, :]
        f0 = torch.zeros_like(log_a) if problem.f0 is None else problem.f0
        g0 = torch.zeros_like(log_b) if problem.g0 is None else problem.g0
        # Comparisons with NaN are false, so each of these conditions excludes NaN as well.
        well_formed = (problem.epsilon > 0) & (problem.epsilon < math.inf)
        well_formed = well_formed & (log_a < math.inf).all(1) & (log_b < math.inf).all(1)
        well_formed = well_formed & (~valid_a | f0.isfinite()).all(1)
        well_formed = well_formed & (~valid_b | g0.isfinite()).all(1)
        well_formed = well_formed & (~pairs | (x > -math.inf)).all(2).all(1)

        self.problem = problem
        self.empty = ~(valid_a.any(1) & valid_b.any(1))
        self.pairs = pairs
        self.malformed = ~well_formed & ~self.empty
        self.active = well_formed & ~self.empty
        self.log_a = torch.where(self.active[:, None], log_a, -math.inf)
        self.log_b = torch.where(self.active[:, None], log_b, -math.inf)
        self.a, self.b = self.log_a.exp(), self.log_b.exp()
        self.epsilon = torch.where(self.active, problem.epsilon, 1.0)
        self.allowed = pairs & (x != math.inf) & self.active[:, None, None]
        self.has_pair_a, self.has_pair_b = self.allowed.any(2), self.allowed.any(1)
        self.cost = torch.where(self.allowed, x, 0.0)
        self.f0 = torch.where(self.has_pair_a, f0, 0.0)
        self.g0 = torch.where(self.has_pair_b, g0, 0.0)

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        """Compute the plan (B, n, m) of the potentials."""
        cost = self.cost.masked_fill(~self.allowed, math.inf)
        return plan(cost, self.log_a, self.log_b, self.epsilon, f, g)

    def optimal_sums(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column sums that an optimal plan with these potentials has.

        For the rows, a if the marginal is fixed and a exp(-f / rho_a) if it is penalised.
        """
        rho_a, rho_b = self.problem.rho_a, self.problem.rho_b
        rows, columns = self.a, self.b
        if rho_a != math.inf:
            rows = torch.where(self.has_pair_a, times_exp(self.log_a, -f / rho_a), 0.0)
        if rho_b != math.inf:
            columns = torch.where(self.has_pair_b, times_exp(self.log_b, -g / rho_b), 0.0)
        return rows, columns

    def infeasible_marginals(self) -> Tensor:
        """(B,) whether no plan can have the fixed marginals."""
        fixed_a, fixed_b = self.problem.rho_a == math.inf, self.problem.rho_b == math.inf
        isolated_a = (self.log_a != -math.inf) & ~self.has_pair_a
        isolated_b = (self.log_b != -math.inf) & ~self.has_pair_b
        infeasible = (fixed_a & isolated_a.any(1)) | (fixed_b & isolated_b.any(1))
        total_a, total_b = self.a.sum(1), self.b.sum(1)
        allowance = MASS_TOLERANCE * torch.maximum(total_a, total_b)
        return infeasible | (fixed_a & fixed_b & ~((total_a - total_b).abs() <= allowance))

    def row_scores(self, g: Tensor, epsilon: Tensor) -> Tensor:
        """(B, n, m) exponents of the soft-min over the columns."""
        score = self.log_b[:, None, :] + (g[:, None, :] - self.cost) / epsilon[:, None, None]
        return self._masked(score, self.has_pair_a[:, :, None])

    def column_scores(self, f: Tensor, epsilon: Tensor) -> Tensor:
        """(B, n, m) exponents of the soft-min over the rows."""
        score = self.log_a[:, :, None] + (f[:, :, None] - self.cost) / epsilon[:, None, None]
        return self._masked(score, self.has_pair_b[:, None, :])

    def _masked(self, score: Tensor, has_pair: Tensor) -> Tensor:
        """-inf for pairs that are not allowed, but 0 if none is, where gradients would be NaN."""
        return torch.where(self.allowed, score, torch.where(has_pair, -math.inf, 0.0).to(score))

    def row_softmin(self, g: Tensor, epsilon: Tensor) -> Tensor:
        """(B, n) soft-min of cost - g over the columns; 0 for rows without an allowed pair."""
        softmin = -epsilon[:, None] * self.row_scores(g, epsilon).logsumexp(2)
        return torch.where(self.has_pair_a, softmin, 0.0)

    def column_softmin(self, f: Tensor, epsilon: Tensor) -> Tensor:
        """(B, m) soft-min of cost - f over the rows; 0 for columns without an allowed pair."""
        softmin = -epsilon[:, None] * self.column_scores(f, epsilon).logsumexp(1)
        return torch.where(self.has_pair_b, softmin, 0.0)

    def temperature(self, iteration: int) -> Tensor:
        """(B,) temperature of an iteration, which decreases to epsilon under annealing."""
        start, ratio = self.problem.anneal_start, self.problem.anneal_ratio
        return self.epsilon.clamp(min=start * ratio**iteration) if start > 0 else self.epsilon

    def plain(self, iteration: int) -> Tensor:
        """(B,) whether an iteration uses neither over-relaxation nor Anderson acceleration."""
        return (self.temperature(iteration) != self.epsilon) | (iteration == 0)

    def factors(self, iteration: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1) alpha, beta_a, beta_b: the update is alpha * potential + beta * soft-min."""
        omega = torch.full_like(self.epsilon, self.problem.omega)[:, None]
        if self.problem.omega != 1:
            omega = omega.masked_fill(self.plain(iteration)[:, None], 1.0)
        epsilon = self.temperature(iteration)[:, None]
        rho_a, rho_b = self.problem.rho_a, self.problem.rho_b
        beta_a = omega if rho_a == math.inf else omega * (rho_a / (rho_a + epsilon))
        beta_b = omega if rho_b == math.inf else omega * (rho_b / (rho_b + epsilon))
        return 1 - omega, beta_a, beta_b

    def iterations(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield f, g, (B,) whether the iteration counts, and (B,) whether the problem stopped."""
        return self._accelerated() if self.problem.anderson else self._relaxed()

    def _relaxed(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        tol = self.problem.tol
        f, g, stopped = self.f0, self.g0, ~self.active
        column_error = torch.zeros_like(self.epsilon)
        for iteration in range(self.problem.max_iter):
            epsilon = self.temperature(iteration)
            alpha, beta_a, beta_b = self.factors(iteration)
            softmin = self.row_softmin(g, epsilon)
            if tol > 0 and iteration > 0:
                # The half-step of f also gives the row sums of the iterate it starts from.
                rows = times_exp(self.log_a, (f - softmin) / epsilon[:, None])
                rows = torch.where(self.has_pair_a, rows, 0.0)
                error = (rows - self.optimal_sums(f, g)[0]).abs().sum(1) + column_error
                annealed = self.temperature(iteration - 1) == self.epsilon
                stopped = stopped | (annealed & (error <= tol))
            f = torch.where(stopped[:, None], f, alpha * f + beta_a * softmin)
            softmin = self.column_softmin(f, epsilon)
            g = torch.where(stopped[:, None], g, alpha * g + beta_b * softmin)
            if tol > 0 and self.problem.omega != 1:
                # Over-relaxed columns are not exact.
                column_error = self._column_error(f, g, softmin, epsilon)
            yield f, g, ~stopped, stopped
            if self._all_stopped(stopped):
                return

    def _accelerated(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Anderson acceleration of the map g -> T(g) of one plain iteration, with a safeguard.

        An extrapolated g that raises the error of the columns is rejected and the memory cleared.
        The iterates yielded are f and T(g), never an extrapolation.
        """
        tol, memory = self.problem.tol, self.problem.anderson
        f, g, image, stopped = self.f0, self.g0, self.g0, ~self.active
        # Differences of consecutive g and of consecutive updates T(g) - g, oldest first.
        g_steps, update_steps = (g.new_zeros(memory, *g.shape) for _ in range(2))
        filled = torch.zeros(memory, len(g), dtype=torch.bool, device=g.device)
        last_g, last_update, last_image = g, torch.zeros_like(g), g
        last_error = torch.zeros_like(self.epsilon)
        has_last, extrapolated = torch.zeros_like(stopped), torch.zeros_like(stopped)
        for iteration in range(self.problem.max_iter):
            epsilon, plain = self.temperature(iteration), self.plain(iteration)
            _, beta_a, beta_b = self.factors(iteration)
            counted = ~stopped
            f = torch.where(stopped[:, None], f, beta_a * self.row_softmin(g, epsilon))
            softmin = self.column_softmin(f, epsilon)
            image = torch.where(stopped[:, None], image, beta_b * softmin)
            update = image - g
            error = self._column_error(f, g, softmin, epsilon)
            if tol > 0:
                stopped = stopped | (~plain & (error <= tol))
            rejected = ~plain & extrapolated & ~(error <= last_error)
            accepted = ~plain & ~rejected

            pushed = accepted & has_last
            g_steps = _push(g_steps, g - last_g, pushed)
            update_steps = _push(update_steps, update - last_update, pushed)
            filled = _push(filled, torch.ones_like(pushed), pushed) & accepted
            correction = self._correction(g_steps, update_steps, filled, update)
            mixed = image - correction
            # Without a feasible plan, mixtures diverge. Once the spacing of their floating-point
            # numbers is comparable to epsilon, such potentials satisfy any criterion.
            limit = self.epsilon[:, None] / (32 * torch.finfo(mixed.dtype).eps)
            extrapolated = accepted & filled.any(0) & (mixed.abs() <= limit).all(1)
            filled = filled & extrapolated
            fallback = torch.where(rejected[:, None], last_image, image)
            next_g = torch.where(extrapolated[:, None], mixed, fallback)

            keep = accepted[:, None]
            last_g = torch.where(keep, g, last_g)
            last_update = torch.where(keep, update, last_update)
            last_image = torch.where(keep, image, last_image)
            last_error = torch.where(accepted, error, last_error)
            has_last, g = accepted, next_g
            yield f, image, counted, stopped
            if self._all_stopped(stopped):
                return

    def _column_error(self, f: Tensor, g: Tensor, softmin: Tensor, epsilon: Tensor) -> Tensor:
        """(B,) error of the columns of f and g, given the soft-min of f."""
        columns = times_exp(self.log_b, (g - softmin) / epsilon[:, None])
        columns = torch.where(self.has_pair_b, columns, 0.0)
        return (columns - self.optimal_sums(f, g)[1]).abs().sum(1)

    def _correction(
        self, g_steps: Tensor, update_steps: Tensor, filled: Tensor, update: Tensor
    ) -> Tensor:
        """(B, m) what Anderson acceleration subtracts from T(g)."""
        correction = _mixture(self.b, g_steps, update_steps, filled, update)
        if self.problem.rho_a == self.problem.rho_b == math.inf:
            # A constant may move between f and g. Left alone, it grows until digits are lost.
            mean = (self.b * correction).sum(1) / self.b.sum(1)
            centred = correction - mean[:, None]
            return torch.where(self.has_pair_b & self.active[:, None], centred, correction)
        return correction

    def _all_stopped(self, stopped: Tensor) -> bool:
        """Whether every problem stopped; False where only a device sync could tell."""
        return self.problem.tol > 0 and stopped.device.type == "cpu" and bool(stopped.all())


def _push(history: Tensor, newest: Tensor, pushed: Tensor) -> Tensor:
    """Append ``newest`` (B, ...) to ``history`` (memory, B, ...) for the problems in ``pushed``."""
    shifted = torch.cat([history[1:], newest[None]])
    return torch.where(pushed.view(-1, *[1] * (history.dim() - 2)), shifted, history)


def _mixture(
    mass: Tensor, g_steps: Tensor, update_steps: Tensor, filled: Tensor, update: Tensor
) -> Tensor:
    """(B, m) Anderson's correction: least squares of the update over the differences in memory.

    mass and update are (B, m), g_steps and update_steps (memory, B, m), filled (memory, B).
    """
    ridge = 1e-10 if mass.dtype == torch.float64 else 1e-6
    steps = torch.where(filled[:, :, None], update_steps, 0.0).double()
    gram = torch.einsum("ubj,bj,vbj->buv", steps, mass.double(), steps)
    right = torch.einsum("ubj,bj,bj->bu", steps, mass.double(), update.double())
    trace = gram.diagonal(dim1=1, dim2=2).sum(1) / filled.sum(0).clamp(min=1)
    # The row of an unfilled entry is zero; any positive diagonal keeps its weight at 0.
    diagonal = torch.where(filled.T, ridge * trace[:, None], 1.0)
    weights = torch.linalg.solve_ex(gram + diagonal.diag_embed(), right)[0].to(mass)
    weights = torch.where(filled.T, weights, 0.0)
    return torch.einsum(
        "bu,ubj->bj", weights, torch.where(filled[:, :, None], g_steps + update_steps, 0.0)
    )
