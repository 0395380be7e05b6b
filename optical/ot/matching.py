"""Doubly stochastic matrices, matching with dustbins, and partial transport."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optical.backends import registry
from optical.backends.problem import BACKEND_NAMES, Status
from optical.ot import matrix_scaling
from optical.ot.checks import (
    MAX_ITERATIONS,
    check_floating,
    check_options,
    check_pair,
    check_shape,
    fold,
    tracing,
    unfold,
    values_available,
)
from optical.ot.functional import Gradient, sinkhorn
from optical.ot.masses import COST_COLUMNS, COST_ROWS, Masses
from optical.ot.matrix_scaling import logsumexp


def doubly_stochastic(
    logits: Tensor, *, iterations: int = 20, temperature: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Scale ``exp(logits / temperature)`` until rows and columns sum to 1.

    One iteration divides by the row sums, then by the column sums: the columns of the result sum
    to 1, its rows up to convergence. The first half iteration is the softmax of the rows. This is
    the layer of Gumbel-Sinkhorn (add the noise to the logits), soft permutations and
    manifold-constrained hyper-connections (mHC; without the constant that some implementations add
    to denominators). Batches of matrices up to 64 x 64 on a CPU are scaled by a native kernel.

    Args:
        logits: (..., n, n), float64, float32, float16 or bfloat16; half precision is computed in
            float32. -inf forbids an entry; rows and columns without an allowed entry stay 0, so
            they serve as padding.
        iterations: number of iterations, at least 1.
        temperature: number > 0 that divides the logits. For a learnable one, divide them before.
        backend: "auto", "cuda", "triton", "cpu", or "reference" for a loop in plain PyTorch, which
            has second and forward-mode derivatives.

    Returns:
        (..., n, n) in the dtype of the logits, with the exact derivative of the iterations run.
        A matrix with NaN or +inf becomes NaN, as does its gradient; the others are unaffected.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
        BackendUnsupported: the backend requested by name cannot scale the matrices.
        RuntimeError: a second or a forward-mode derivative is requested.

    Source: Mena et al., "Learning Latent Permutations with Gumbel-Sinkhorn Networks" (arXiv
    1802.08665); Xie et al., "mHC: Manifold-Constrained Hyper-Connections" (arXiv 2512.24880).

    Examples:
        >>> import torch
        >>> from optical.ot.matching import doubly_stochastic
        >>> doubly_stochastic(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).round(decimals=3)
        tensor([[0.7310, 0.2690],
                [0.2690, 0.7310]])
    """
    check_floating("logits", logits, "(..., n, n)", 2, least=True)
    if logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected (..., n, n)")
    _check_iterations(iterations)
    _check_positive("temperature", temperature)
    if backend not in BACKEND_NAMES:
        expected = ", ".join(repr(name) for name in BACKEND_NAMES)
        raise ValueError(f"backend is {backend!r}; expected one of {expected}")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits if logits.dtype == dtype else logits.to(dtype)
    name = registry.requested(backend)
    if name in ("auto", "cpu") and matrix_scaling.supports(x):
        result = matrix_scaling.scale(x, int(iterations), float(temperature))
    elif name == "reference" or not x.numel():
        result = matrix_scaling.scale_by_loop(x / temperature, iterations)
    else:
        masses = x.new_zeros(x.shape[:-1])
        result = sinkhorn(
            *(-x, masses, masses),
            epsilon=float(temperature),
            max_iter=iterations,
            gradient="unroll",
            backend=backend,
        ).plan()
    return result if result.dtype == logits.dtype else result.to(logits.dtype)


def _check_iterations(iterations: Any) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, (int, numbers.Integral)):
        raise TypeError(f"iterations is a {type(iterations).__name__}; expected an int >= 1")
    if not 1 <= int(iterations) <= MAX_ITERATIONS:
        raise ValueError(f"iterations is {iterations}; expected an int >= 1 and < 2**31")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a float > 0")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} is {value}; expected a finite number > 0")


# -------------------------------------------------------------------------------------- dustbins


def dustbin_matching(
    scores: Tensor,
    dustbin: float | Tensor | tuple[float | Tensor, float | Tensor],
    *,
    iterations: int = 100,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    gradient: Gradient = "unroll",
    backend: str = "auto",
) -> Tensor:
    """Match rows to columns, or to a dustbin on either side: the optimal matching of SuperGlue.

    The scores get one more row and column, filled with the score of the dustbin. A row or column
    has mass 1; each dustbin can take all of the other side. One iteration updates the rows, then
    the columns.

    Args:
        scores: (..., n, m), float64, float32, float16 or bfloat16 (half precision is computed in
            float32); higher is better. -inf forbids a pair.
        dustbin: score of leaving a row or a column unmatched: a number, or a tensor of shape () or
            (...), which may require a gradient. A pair has the score of unmatched rows (last
            column) and of unmatched columns (last row); their corner has the mean.
        iterations: number of iterations, at least 1.
        mask_a, mask_b: (..., n) and (..., m), bool or 0/1 numbers; 0 marks padding.
        gradient: "unroll" differentiates the iterations run; "implicit" the fixed point.
        backend: see ``optical.sinkhorn``.

    Returns:
        (..., n + 1, m + 1) logarithm of the plan, in float32 (float64 for float64 scores).
        Except for the dustbins, rows sum to 1 in the limit and columns exactly; padding is -inf.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
        BackendUnsupported: the backend requested by name cannot solve the problem.

    Source: Sarlin et al., "SuperGlue: Learning Feature Matching with Graph Neural Networks" (arXiv
    1911.11763), section 3.2; masks as in Qin et al., "Geometric Transformer for Fast and Robust
    Point Cloud Registration" (arXiv 2202.06688), whose padding has scores near -1e12.

    Examples:
        >>> import torch
        >>> from optical.ot.matching import dustbin_matching
        >>> scores = torch.tensor([[20.0, 0.0], [0.0, -9.0], [0.0, 0.0]])
        >>> dustbin_matching(scores, dustbin=5.0).exp().round(decimals=1)
        tensor([[1., 0., 0.],
                [0., 0., 1.],
                [0., 0., 1.],
                [0., 1., 1.]])
    """
    check_floating("scores", scores, "(..., n, m)", 2, least=True)
    _check_iterations(iterations)
    lead, (n, m) = tuple(scores.shape[:-2]), scores.shape[-2:]
    scores = fold(scores if scores.dtype == torch.float64 else scores.float(), lead)
    last_column, last_row = (
        _dustbin(score, scores, lead)
        for score in (
            check_pair("dustbin", dustbin, "(rows, columns)")
            if isinstance(dustbin, (tuple, list))
            else (dustbin, dustbin)
        )
    )
    batch, dtype = scores.shape[0], scores.dtype
    corner = (last_column + last_row) / 2
    above = torch.cat([scores, last_column.expand(batch, n, 1)], 2)
    couplings = torch.cat([above, torch.cat([last_row.expand(batch, 1, m), corner], 2)], 1)
    uniform_a, uniform_b = (
        Masses(names._replace(source="scores"), mask=mask)
        .fold(lead, lead, size)
        .log_masses(scores, (batch, size), dtype, True)
        for names, mask, size in ((COST_ROWS, mask_a, n), (COST_COLUMNS, mask_b, m))
    )
    count_a, count_b = (
        (x != -math.inf).sum(1, keepdim=True).to(dtype) for x in (uniform_a, uniform_b)
    )
    norm = -(count_a + count_b).clamp(min=1).log()
    log_a, log_b = (
        # A uniform mass is NaN if the mask is neither 0 nor 1.
        torch.cat([torch.where(x == -math.inf, x, norm + x * 0), count.log() + norm], 1)
        for x, count in ((uniform_a, count_b), (uniform_b, count_a))
    )
    # SuperGlue starts from v = g + log b = 0.
    start = torch.where(log_b == -math.inf, 0.0, -log_b)
    result = sinkhorn(
        *(-couplings, log_a, log_b),
        epsilon=1.0,
        max_iter=iterations,
        init=(torch.zeros_like(log_a), start),
        gradient=gradient,
        backend=backend,
    )
    return unfold(result.log_plan() - norm[:, :, None], lead)


def _dustbin(score: Any, scores: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return the score of a dustbin as (batch, 1, 1)."""
    if not isinstance(score, Tensor):
        if isinstance(score, bool) or not isinstance(score, (float, numbers.Real)):
            expected = "a number, a tensor () or (...), or a pair of these"
            raise TypeError(f"dustbin holds a {type(score).__name__}; expected {expected}")
        return scores.new_full((scores.shape[0], 1, 1), float(score))
    if score.numel() != 1:
        check_shape("dustbin", score, lead, "the leading dimensions of scores, or ()")
    flat = score.to(scores).reshape(-1, 1, 1)
    return flat.expand(scores.shape[0], 1, 1)


# ------------------------------------------------------------------------------ partial transport


class PartialPlan(NamedTuple):
    """Solution of ``partial_transport``; (...) are the leading dimensions of the cost.

    Attributes:
        plan: (..., n, m), whose entries sum to ``mass``.
        value_linear: (...) transport cost ``<plan, cost>``.
        slack_a: (..., n) mass of each row that stays, ``a`` minus the row sum.
        slack_b: (..., m) the same for the columns.
        marginal_error: (...) L1 distance of the marginals from optimal ones: what they exceed a and
            b by, and what is missing from rows and columns that the dual holds to be full.
        status: (...) int32 ``optical.Status``: CONVERGED, MAX_ITER, or INFEASIBLE where an output
            is not finite.
    """

    plan: Tensor
    value_linear: Tensor
    slack_a: Tensor
    slack_b: Tensor
    marginal_error: Tensor
    status: Tensor


def partial_transport(
    cost: Tensor,
    mass: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> PartialPlan:
    """Transport a part of the mass: rows send at most a, columns receive at most b.

    The plan minimises ``<P, cost> + epsilon * sum P (log P - 1)`` subject to ``P 1 <= a``,
    ``P' 1 <= b`` and a total of ``mass``. It is ``exp((f_i + g_j + t - cost_ij) / epsilon)`` with
    ``f <= 0`` and ``g <= 0``; each iteration maximises the dual exactly by f, then g, then t, in
    plain PyTorch. Autograd differentiates the iterations run, by cost, mass, a and b.

    Args:
        cost: (..., n, m), float64, float32, float16 or bfloat16 (half precision is computed in
            float32). +inf forbids a pair.
        mass: total mass to transport, a number or a tensor (...), positive and at most the smaller
            total of a and b. Values on a GPU are not validated.
        a, b: (..., n) and (..., m) masses; 0 marks padding. If None, equal masses that sum to 1.
        epsilon: temperature > 0 (POT: ``reg``).
        mask_a, mask_b: (..., n) and (..., m), bool or 0/1 numbers; 0 marks padding.
        max_iter: largest number of iterations (POT: ``numItermax``).
        tol: a problem stops at the first tenth iteration whose ``marginal_error`` is at most
            ``tol``. 0 runs exactly ``max_iter`` iterations.

    Returns:
        A PartialPlan.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.

    Source: Benamou et al., "Iterative Bregman Projections for Regularized Transportation Problems"
    (arXiv 1412.5154), section 5, whose solution POT's ``ot.partial.entropic_partial_wasserstein``
    computes.

    Examples:
        >>> import torch
        >>> from optical.ot.matching import partial_transport
        >>> cost = torch.tensor([[0.0, 9.0], [9.0, 5.0]])
        >>> partial_transport(cost, 0.5, epsilon=0.1).plan.round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]])
    """
    check_floating("cost", cost, "(..., n, m)", 2, least=True)
    _check_positive("epsilon", epsilon)
    check_options("partial_transport", epsilon=epsilon, max_iter=max_iter, tol=tol)
    lead, (n, m) = tuple(cost.shape[:-2]), cost.shape[-2:]
    cost = fold(cost if cost.dtype == torch.float64 else cost.float(), lead)
    batch, dtype = cost.shape[0], cost.dtype
    log_a, log_b = (
        Masses(names, mask=mask, mass=masses)
        .fold(lead, lead, size)
        .log_masses(cost, (batch, size), dtype, False)
        for names, mask, masses, size in (
            (COST_ROWS, mask_a, a, n),
            (COST_COLUMNS, mask_b, b, m),
        )
    )
    log_mass = _log_mass(mass, log_a, log_b, lead)
    with torch.autocast(cost.device.type, enabled=False):
        outputs = _PartialProblem(cost, log_a, log_b, log_mass, epsilon).solve(max_iter, tol)
    return PartialPlan(*(unfold(x, lead) for x in outputs))


def _log_mass(mass: Any, log_a: Tensor, log_b: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return the logarithm (batch, 1, 1) of the mass to transport, checked where values are."""
    if isinstance(mass, Tensor):
        if mass.numel() != 1:
            check_shape("mass", mass, lead, "the leading dimensions of cost, or ()")
        mass = mass.to(log_a).reshape(-1, 1, 1).expand(log_a.shape[0], 1, 1)
    else:
        _check_positive("mass", mass)
        mass = log_a.new_full((log_a.shape[0], 1, 1), float(mass))
    if values_available(mass) and values_available(log_a) and values_available(log_b):
        total = torch.minimum(*(x.detach().exp().sum(1) for x in (log_a, log_b)))
        found = mass.detach().view(-1)
        wrong = ~((found > 0) & (found <= total * (1 + 1e-5)))
        if bool(wrong.any()):
            worst = int(wrong.nonzero()[0])
            raise ValueError(
                f"mass is {found[worst].item():.6g}; expected a number > 0 and at most "
                f"{total[worst].item():.6g}, the smaller total of a and b"
            )
    log_mass: Tensor = mass.log()
    return log_mass


class _PartialProblem:
    """Block-coordinate ascent on the dual, in units of epsilon; a batch of problems (B, n, m)."""

    def __init__(
        self, cost: Tensor, log_a: Tensor, log_b: Tensor, log_mass: Tensor, epsilon: float
    ) -> None:
        self.log_a, self.log_b = log_a[:, :, None], log_b[:, None, :]
        padding = (self.log_a == -math.inf) | (self.log_b == -math.inf)
        self.cost, self.log_mass = torch.where(padding, math.inf, cost), log_mass
        self.exponent = -self.cost / epsilon

    def solve(self, max_iter: int, tol: float) -> tuple[Tensor, ...]:
        """Return the fields of a PartialPlan."""
        f, g = torch.zeros_like(self.log_a), torch.zeros_like(self.log_b)
        t = self._offset(self.exponent)
        done = torch.zeros_like(t, dtype=torch.bool)
        for k in range(1, max_iter + 1):
            new_f = self._fill(self.log_a, self.exponent + g + t, 2)
            new_g = self._fill(self.log_b, self.exponent + new_f + t, 1)
            new_t = self._offset(self.exponent + new_f + new_g)
            f, g, t = (
                torch.where(done, old, new) for old, new in ((f, new_f), (g, new_g), (t, new_t))
            )
            if tol > 0 and k % 10 == 0 and not tracing():
                # A NaN does not keep the other problems going.
                done = ~(self._error((self.exponent + f + g + t).exp(), f, g) > tol)
                if bool(done.all()):
                    break
        plan = (self.exponent + f + g + t).exp()
        value = (plan * torch.where(plan == 0, 0.0, self.cost)).sum((1, 2))
        error = self._error(plan, f, g).view(-1)
        converged = (error <= tol) & (tol > 0)
        status = torch.where(converged, int(Status.CONVERGED), int(Status.MAX_ITER))
        status = torch.where((error + value).isfinite(), status, int(Status.INFEASIBLE))
        slack_a = self.log_a.exp().squeeze(2) - plan.sum(2)
        slack_b = self.log_b.exp().squeeze(1) - plan.sum(1)
        return plan, value, slack_a, slack_b, error, status.to(torch.int32)

    def _offset(self, exponent: Tensor) -> Tensor:
        """The potential t that makes the total of the plan ``mass``."""
        return self.log_mass - logsumexp(exponent.flatten(1), 1)[:, :, None]

    @staticmethod
    def _fill(log_mass: Tensor, exponent: Tensor, dim: int) -> Tensor:
        """The potential <= 0 that lowers the sums of rows or columns to their mass."""
        total = logsumexp(exponent, dim)
        unused = (total == -math.inf) | (log_mass == -math.inf)
        difference = torch.where(unused, 0.0, log_mass) - torch.where(unused, 0.0, total)
        return difference.clamp(max=0)

    @torch.no_grad()
    def _error(self, plan: Tensor, f: Tensor, g: Tensor) -> Tensor:
        """L1 distance (B, 1, 1) from marginals that are feasible and complementary to f and g."""
        total = torch.zeros_like(self.log_mass)
        for potential, log_mass, dim in ((f, self.log_a, 2), (g, self.log_b, 1)):
            excess = plan.sum(dim, keepdim=True) - log_mass.exp()
            wrong = torch.where(potential < 0, excess.abs(), excess.clamp(min=0))
            total = total + wrong.sum((1, 2), keepdim=True)
        return total
