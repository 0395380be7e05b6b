"""The problems of a batch, what may be read of them, and the iterations, in plain PyTorch.

The parts of ``optical.backends.reference`` that both the solution and its derivatives need; the formulas
stand there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from optical.backends.problem import Problem

# With both marginals fixed, masses that differ by more than this share of the larger have no plan.
MASS_TOLERANCE = 1e-3


def plan(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, f: Tensor, g: Tensor
) -> Tensor:
    """The coupling (B, n, m) of the potentials, exactly 0 at absent and forbidden pairs."""
    present = (log_a != -math.inf)[:, :, None] & (log_b != -math.inf)[:, None, :]
    allowed = present & (cost != math.inf)
    readable = torch.where(allowed, cost, 0.0)
    exponent = (f[:, :, None] + g[:, None, :] - readable) / epsilon[:, None, None]
    exponent = exponent + log_a[:, :, None] + log_b[:, None, :]
    return exponent.masked_fill(~allowed, -math.inf).exp()


def times_exp(log_mass: Tensor, exponent: Tensor) -> Tensor:
    """A mass times exp(exponent), where the one may be 0 as a number and the other infinite.

    Only what an exponential cannot hold goes to the logarithm of the mass, whose rounding it would
    otherwise share.
    """
    excess = (exponent - 80).clamp(min=0)
    return (log_mass + excess).exp() * (exponent - excess).exp()


class MaskedProblem:
    """Problem in which everything that must not be read was replaced, and the iterations."""

    def __init__(self, arguments: Problem) -> None:
        x, log_a, log_b = arguments.x, arguments.log_a, arguments.log_b
        present_a, present_b = log_a != -math.inf, log_b != -math.inf
        pairs = present_a[:, :, None] & present_b[:, None, :]
        f0 = torch.zeros_like(log_a) if arguments.f0 is None else arguments.f0
        g0 = torch.zeros_like(log_b) if arguments.g0 is None else arguments.g0
        # A comparison with NaN is false, so each line asks for numbers too.
        readable = (arguments.epsilon > 0) & (arguments.epsilon < math.inf)
        readable = readable & (log_a < math.inf).all(1) & (log_b < math.inf).all(1)
        readable = readable & (~present_a | f0.isfinite()).all(1)
        readable = readable & (~present_b | g0.isfinite()).all(1)
        readable = readable & (~pairs | (x > -math.inf)).all(2).all(1)

        self.arguments = arguments
        self.empty = ~(present_a.any(1) & present_b.any(1))
        self.broken = ~readable & ~self.empty
        # A problem that is not live is given no mass at all, so that nothing happens in it.
        self.live = readable & ~self.empty
        self.log_a = torch.where(self.live[:, None], log_a, -math.inf)
        self.log_b = torch.where(self.live[:, None], log_b, -math.inf)
        self.a, self.b = self.log_a.exp(), self.log_b.exp()
        self.epsilon = torch.where(self.live, arguments.epsilon, 1.0)
        self.allowed = pairs & (x != math.inf) & self.live[:, None, None]
        self.alive_a, self.alive_b = self.allowed.any(2), self.allowed.any(1)
        self.cost = torch.where(self.allowed, x, 0.0)
        self.f0 = torch.where(self.alive_a, f0, 0.0)
        self.g0 = torch.where(self.alive_b, g0, 0.0)

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        cost = self.cost.masked_fill(~self.allowed, math.inf)
        return plan(cost, self.log_a, self.log_b, self.epsilon, f, g)

    def wanted(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column sums of the optimal plan: a, or a exp(-f / rho_a) against a penalty."""
        rho_a, rho_b = self.arguments.rho_a, self.arguments.rho_b
        rows, columns = self.a, self.b
        if rho_a != math.inf:
            rows = torch.where(self.alive_a, times_exp(self.log_a, -f / rho_a), 0.0)
        if rho_b != math.inf:
            columns = torch.where(self.alive_b, times_exp(self.log_b, -g / rho_b), 0.0)
        return rows, columns

    def infeasible(self) -> Tensor:
        """(B,) whether no plan can have the marginals that are fixed."""
        fixed_a, fixed_b = self.arguments.rho_a == math.inf, self.arguments.rho_b == math.inf
        dead_a = (self.log_a != -math.inf) & ~self.alive_a
        dead_b = (self.log_b != -math.inf) & ~self.alive_b
        found = (fixed_a & dead_a.any(1)) | (fixed_b & dead_b.any(1))
        total_a, total_b = self.a.sum(1), self.b.sum(1)
        allowance = MASS_TOLERANCE * torch.maximum(total_a, total_b)
        return found | (fixed_a & fixed_b & ~((total_a - total_b).abs() <= allowance))

    def row_scores(self, g: Tensor, epsilon: Tensor) -> Tensor:
        score = self.log_b[:, None, :] + (g[:, None, :] - self.cost) / epsilon[:, None, None]
        return self._readable(score, self.alive_a[:, :, None])

    def column_scores(self, f: Tensor, epsilon: Tensor) -> Tensor:
        score = self.log_a[:, :, None] + (f[:, :, None] - self.cost) / epsilon[:, None, None]
        return self._readable(score, self.alive_b[:, None, :])

    def _readable(self, score: Tensor, alive: Tensor) -> Tensor:
        """-inf where not allowed, but zeros on a dead line, where a gradient would become NaN."""
        return torch.where(self.allowed, score, torch.where(alive, -math.inf, 0.0).to(score))

    def row_minimum(self, g: Tensor, epsilon: Tensor) -> Tensor:
        minimum = -epsilon[:, None] * self.row_scores(g, epsilon).logsumexp(2)
        return torch.where(self.alive_a, minimum, 0.0)

    def column_minimum(self, f: Tensor, epsilon: Tensor) -> Tensor:
        minimum = -epsilon[:, None] * self.column_scores(f, epsilon).logsumexp(1)
        return torch.where(self.alive_b, minimum, 0.0)

    def temperature(self, iteration: int) -> Tensor:
        """(B,) the temperature of an iteration, which falls to epsilon when annealing."""
        start, ratio = self.arguments.anneal_start, self.arguments.anneal_ratio
        return self.epsilon.clamp(min=start * ratio**iteration) if start > 0 else self.epsilon

    def plain(self, iteration: int) -> Tensor:
        """(B,) whether neither over-relaxation nor Anderson acts yet."""
        return (self.temperature(iteration) != self.epsilon) | (iteration == 0)

    def factors(self, iteration: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1) alpha, beta_a, beta_b: a potential moves to alpha * old + beta * minimum."""
        omega = torch.full_like(self.epsilon, self.arguments.omega)[:, None]
        if self.arguments.omega != 1:
            omega = omega.masked_fill(self.plain(iteration)[:, None], 1.0)
        epsilon = self.temperature(iteration)[:, None]
        rho_a, rho_b = self.arguments.rho_a, self.arguments.rho_b
        beta_a = omega if rho_a == math.inf else omega * (rho_a / (rho_a + epsilon))
        beta_b = omega if rho_b == math.inf else omega * (rho_b / (rho_b + epsilon))
        return 1 - omega, beta_a, beta_b

    def iterations(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """f, g, whether the iteration counts and whether it is over, (B,), after each iteration."""
        return self._accelerated() if self.arguments.anderson else self._relaxed()

    def _relaxed(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        tol = self.arguments.tol
        f, g, stopped = self.f0, self.g0, ~self.live
        for iteration in range(self.arguments.max_iter):
            epsilon = self.temperature(iteration)
            alpha, beta_a, beta_b = self.factors(iteration)
            minimum = self.row_minimum(g, epsilon)
            if tol > 0 and iteration > 0:
                # The f half-step measures the row sums of the iterate that it starts from.
                rows = times_exp(self.log_a, (f - minimum) / epsilon[:, None])
                rows = torch.where(self.alive_a, rows, 0.0)
                error = (rows - self.wanted(f, g)[0]).abs().sum(1)
                settled = self.temperature(iteration - 1) == self.epsilon
                stopped = stopped | (settled & (error <= tol))
            f = torch.where(stopped[:, None], f, alpha * f + beta_a * minimum)
            minimum = self.column_minimum(f, epsilon)
            g = torch.where(stopped[:, None], g, alpha * g + beta_b * minimum)
            yield f, g, ~stopped, stopped
            if self._over(stopped):
                return

    def _accelerated(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Anderson acceleration of g -> T(g), one plain iteration, with a safeguard.

        An extrapolated g that raises the column residual is thrown away together with the memory.
        The iterates yielded are f and T(g), never an extrapolation.
        """
        tol, memory = self.arguments.tol, self.arguments.anderson
        f, g, image, stopped = self.f0, self.g0, self.g0, ~self.live
        moves, changes = (g.new_zeros(memory, *g.shape) for _ in range(2))
        filled = torch.zeros(memory, len(g), dtype=torch.bool, device=g.device)
        last_g, last_change, last_image = g, torch.zeros_like(g), g
        last_residual = torch.zeros_like(self.epsilon)
        has_last, extrapolated = torch.zeros_like(stopped), torch.zeros_like(stopped)
        for iteration in range(self.arguments.max_iter):
            epsilon, plain = self.temperature(iteration), self.plain(iteration)
            _, beta_a, beta_b = self.factors(iteration)
            counted = ~stopped
            f = torch.where(stopped[:, None], f, beta_a * self.row_minimum(g, epsilon))
            minimum = self.column_minimum(f, epsilon)
            image = torch.where(stopped[:, None], image, beta_b * minimum)
            change = image - g
            columns = times_exp(self.log_b, (g - minimum) / epsilon[:, None])
            columns = torch.where(self.alive_b, columns, 0.0)
            residual = (columns - self.wanted(f, g)[1]).abs().sum(1)
            if tol > 0:
                stopped = stopped | (~plain & (residual <= tol))
            rejected = ~plain & extrapolated & ~(residual <= last_residual)
            accepted = ~plain & ~rejected

            pushed = accepted & has_last
            moves, changes, filled = (
                torch.where(
                    pushed.view(-1, *[1] * (old.dim() - 2)), torch.cat([old[1:], new[None]]), old
                )
                for old, new in (
                    (moves, g - last_g),
                    (changes, change - last_change),
                    (filled, torch.ones_like(pushed)),
                )
            )
            filled = filled & accepted
            taken = _mixture(self.b, moves, changes, filled, change)
            if self.arguments.rho_a == self.arguments.rho_b == math.inf:
                # A constant may move between f and g: left alone, it grows until digits are lost.
                mean = (self.b * taken).sum(1) / self.b.sum(1)
                taken = torch.where(self.alive_b & self.live[:, None], taken - mean[:, None], taken)
            mixed = image - taken
            # Where no plan exists mixtures run away, and potentials whose last digit is worth a
            # temperature satisfy anything.
            most = self.epsilon[:, None] / (32 * torch.finfo(mixed.dtype).eps)
            extrapolated = accepted & filled.any(0) & (mixed.abs() <= most).all(1)
            filled = filled & extrapolated
            retreat = torch.where(rejected[:, None], last_image, image)
            g_next = torch.where(extrapolated[:, None], mixed, retreat)

            keep = accepted[:, None]
            last_g = torch.where(keep, g, last_g)
            last_change = torch.where(keep, change, last_change)
            last_image = torch.where(keep, image, last_image)
            last_residual = torch.where(accepted, residual, last_residual)
            has_last, g = accepted, g_next
            yield f, image, counted, stopped
            if self._over(stopped):
                return

    def _over(self, stopped: Tensor) -> bool:
        """Whether nothing can happen any more, asked only where the answer is at hand."""
        return self.arguments.tol > 0 and stopped.device.type == "cpu" and bool(stopped.all())


def _mixture(
    mass: Tensor, moves: Tensor, changes: Tensor, filled: Tensor, change: Tensor
) -> Tensor:
    """What Anderson takes off the plain image: least squares over the differences remembered.

    mass and change are (B, m), moves and changes (memory, B, m), filled (memory, B).
    """
    ridge = 1e-10 if mass.dtype == torch.float64 else 1e-6
    known = torch.where(filled[:, :, None], changes, 0.0).double()
    gram = torch.einsum("ubj,bj,vbj->buv", known, mass.double(), known)
    right = torch.einsum("ubj,bj,bj->bu", known, mass.double(), change.double())
    trace = gram.diagonal(dim1=1, dim2=2).sum(1) / filled.sum(0).clamp(min=1)
    # An empty place has a row of zeros; any number on its diagonal leaves its weight at 0.
    diagonal = torch.where(filled.T, ridge * trace[:, None], 1.0)
    weights = torch.linalg.solve_ex(gram + diagonal.diag_embed(), right)[0].to(mass)
    weights = torch.where(filled.T, weights, 0.0)
    return torch.einsum(
        "bu,ubj->bj", weights, torch.where(filled[:, :, None], moves + changes, 0.0)
    )
