"""The float64 truth of one call, and the magnitudes by which errors in its outputs are judged."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optical.backends.dense import PaddedProblem
from optical.backends.iterations import MaskedProblem
from optical.backends.problem import Status
from optical.backends.reference import log_ratio
from tests.stress.calls import OUTPUTS, Call, largest, reference_outputs

OF_VECTORS = ("grad_x", "grad_y", "grad_student", "grad_teacher")
OF_ROWS = ("f", "grad_x", "grad_log_a", "apply_plan", "grad_w")
OF_PROBLEMS = ("value", "value_linear", "marginal_error", "plan")
INF = math.inf


class Comparison:
    """A valid call with its truth, and the quantities that its rounding errors scale with.

    Args:
        call: the call. Only ``implicit_uncertainty`` runs it on its backend.
        truth: outputs of the reference in float64; computed by default.
    """

    def __init__(self, call: Call, truth: dict[str, Tensor] | None = None) -> None:
        self.call = call
        self.truth = reference_outputs(call, torch.float64) if truth is None else truth
        self._samples: list[dict[str, Tensor]] = []
        temperatures = [call.temperature(i) for i in range(call.batch)]
        self.temperatures = [epsilon for epsilon in temperatures if 0 < epsilon < INF]
        self.coldest = min(self.temperatures, default=1.0)

    def sample(self, k: int) -> dict[str, Tensor]:
        """Outputs of the reference in the dtype of the call; nudged inputs for k > 0.

        The first sample keeps the dtype of every input, so half-precision inputs round alike.
        """
        while len(self._samples) <= k:
            i = len(self._samples)
            dtype = None if i == 0 else self.call.dtype
            self._samples.append(reference_outputs(self.call, dtype, i))
        return self._samples[k]

    def of_problems(self, name: str, chosen: Tensor) -> Tensor:
        """Expand a mask of problems (B,) to the entries of an output.

        The result broadcasts against the output: (B, 1, ...), or (N, 1, ...) for packed entries.
        """
        ends = self.call.option("cu_seqlens_" + ("a" if name in OF_ROWS else "b"))
        if ends is not None and name not in OF_PROBLEMS:
            chosen = chosen.repeat_interleave(ends.diff())
        return chosen.view(-1, *[1] * (self.truth[name].dim() - 1))

    @functools.cached_property
    def malformed(self) -> Tensor:
        """(B,) whether an input of a problem is NaN or out of range."""
        problems = [
            call.rounded(torch.float64).run().problem for call in self.call.transport_problems()
        ]
        flags = [MaskedProblem(PaddedProblem(x).with_cost).malformed for x in problems]
        return torch.stack(flags).any(0)

    @property
    def exponents(self) -> float:
        """Rounding of the exponents of the plan: a few units of the largest cost over epsilon."""
        call = self.call
        amplified = max(call.scale, *self.potentials) / self.coldest
        # Kernels, and the library for vectors, sum the costs of the final plan in another order.
        same_order = call.function == "sinkhorn" and not call.on_kernels
        vectors = call.option("x", call.option("student"))
        units = (4 if same_order else 8) + (0 if vectors is None else math.sqrt(vectors.shape[-1]))
        return units * torch.finfo(call.dtype).eps * amplified

    @property
    def hot_rounding(self) -> float:
        """Rounding of all temperatures of an annealing schedule together.

        A potential is a temperature times the logarithm of a sum, which is rounded to a share of 1
        however small it is.
        """
        if self.call.option("anneal") is None or self.call.arguments["max_iter"] == 0:
            return 0.0
        start, ratio = self.call.arguments["anneal"]
        return torch.finfo(self.call.dtype).eps * start / (1 - ratio)

    @functools.cached_property
    def potentials(self) -> tuple[float, ...]:
        """The largest potentials. They diverge where masses differ and no plan exists."""
        if "f" in self.truth:
            return tuple(largest(self.truth[name]) for name in "fg")
        results = [call.rounded(torch.float64).run() for call in self.call.transport_problems()]
        return tuple(largest(x.detach()) for result in results for x in (result.f, result.g))

    @property
    def upstream(self) -> float:
        """The factor between a potential and the gradient of a log-mass."""
        return self.call.mass * sum(map(largest, self.call.cotangents.values()))

    @functools.cached_property
    def largest_plan(self) -> float:
        """The largest total of a plan as a multiple of the given mass; at least 1."""
        return max(1.0, *(transported(call) for call in self.call.transport_problems()))

    @functools.cached_property
    def penalty(self) -> tuple[float, float]:
        """The largest slope of a marginal penalty, and the largest strength."""
        slope = strength = 0.0
        for call in self.call.transport_problems():
            result = call.rounded(torch.float64).run()
            problem, plan = PaddedProblem(result.problem).with_cost, result.plan().detach()
            for rho, sums, log_mass in (
                (problem.rho_a, plan.sum(2), problem.log_a),
                (problem.rho_b, plan.sum(1), problem.log_b),
            ):
                if rho != INF:
                    slope = max(slope, rho * largest(log_ratio(sums, log_mass)))
                    strength = max(strength, rho)
        return slope, strength

    @property
    def sweeps_in_float32(self) -> bool:
        """Whether unrolled gradients are swept in float32: by the kernels only."""
        return self.call.on_kernels and self.call.option("gradient") == "unroll"

    @property
    def rounding_of_slopes(self) -> float:
        """Digits that an unrolled gradient loses to the slope of a marginal penalty over epsilon.

        The truth, and the kernels in float32, carry the slope until the sweep subtracts nearly all
        of it. The CPU library leaves it out from the start. The slope is a logarithm, which the
        truth rounds to a share of 1 however small it is.
        """
        slope, strength = self.penalty
        swept = torch.float32 if self.sweeps_in_float32 else torch.float64
        lost = torch.finfo(swept).eps * slope + torch.finfo(torch.float64).eps * strength
        return lost / self.coldest

    @property
    def implicit_uncertainty(self) -> float:
        return max(implicit_uncertainty(call) for call in self.call.transport_problems())

    @property
    def magnitudes_of_masses(self) -> float:
        """The largest log-mass, as a potential: times the highest temperature."""
        masses = [self.call.option(f"log_{side}", torch.zeros(0)).detach() for side in "ab"]
        return max(map(largest, masses)) * max(self.temperatures, default=0.0)

    def unit(self, name: str) -> float:
        """The size of an output, which relative errors are shares of."""
        call, truth = self.call, self.truth[name].nan_to_num(0.0, 0.0, 0.0)
        epsilon = torch.as_tensor(call.arguments["epsilon"]).nan_to_num(0.0, 0.0, 0.0)
        if name == "value":  # it contains epsilon times the product of both masses
            floor = 1.0
            if epsilon.numel():
                floor = call.scale * call.mass + epsilon.max().item() * call.mass**2
        elif name in ("f", "g", "value_linear", "grad_log_a", "grad_log_b"):
            floor = call.scale * call.mass
        else:
            floor = call.mass * (call.slope if name in OF_VECTORS else 1.0)
        if name.startswith("grad") and call.function == "sinkhorn_divergence":
            # Terms as large as the plans may cancel.
            floor *= self.largest_plan
        return max(floor, truth.abs().max().item())

    def fast_unit(self, name: str) -> float:
        """The unit of an entry of ``optical.testing.tolerance.FAST``."""
        epsilon = max(self.temperatures, default=0.0)
        mass = self.call.mass * self.largest_plan
        units = {"value": epsilon * mass, "value_linear": self.call.scale * mass, "f": epsilon}
        units |= {"marginal_error": mass, "g": epsilon}
        return units.get(name) or self.unit(name)


@dataclass(frozen=True)
class Output:
    """One output of a call, next to its truth.

    Attributes:
        name: name of the output.
        value: the output of the backend.
        comparison: the call and its truth.
    """

    name: str
    value: Tensor
    comparison: Comparison

    @property
    def call(self) -> Call:
        return self.comparison.call

    @property
    def truth(self) -> Tensor:
        return self.comparison.truth[self.name]

    @property
    def is_gradient(self) -> bool:
        return self.name.startswith("grad")

    @property
    def is_plain(self) -> bool:
        """Whether it is a field of the result, so neither a gradient nor made of the plan."""
        return self.name in OUTPUTS

    def equal_where(self, mask: Tensor) -> Output:
        """The same output with the entries of the truth where ``mask`` is true."""
        return replace(self, value=torch.where(mask, self.truth.to(self.value.dtype), self.value))


@dataclass(frozen=True)
class Ending:
    """How a problem ended on the backend and in the truth.

    Attributes:
        call: the call.
        problem: index of the problem.
        counts: iterations of the backend and of the truth.
        statuses: statuses of the backend and of the truth.
    """

    call: Call
    problem: int
    counts: Sequence[int]
    statuses: Sequence[Status]

    @property
    def tol(self) -> float:
        return self.call.option("tol", 0.0)

    @property
    def shorter_run(self) -> Call:
        return self.call.but(tol=0.0, max_iter=min(self.counts))

    @property
    def rounding(self) -> float:
        """Rounding of a residual after the shorter of the two runs."""
        mass = self.call.mass * max(1.0, transported(self.shorter_run))
        rounding = 1e3 * torch.finfo(self.call.dtype).eps * mass
        return rounding * max(1.0, self.call.scale / self.call.temperature(self.problem))

    def residual(self) -> float:
        """L1 error of the truth's marginals after the shorter of the two runs."""
        result = self.shorter_run.rounded(torch.float64).run()
        return result.marginal_error[self.problem].item()


def transported(call: Call) -> float:
    """The largest total of a plan, as a multiple of the given mass."""
    first = call.transport_problems()[0]
    totals = first.rounded(torch.float64).run().plan().detach().sum((1, 2))
    return largest(totals) / call.mass


def implicit_uncertainty(call: Call) -> float:
    """Relative uncertainty of implicit gradients.

    Their linear system is singular up to the shift of the potentials, and nearly so where parts of
    a problem exchange little mass. Errors of the right-hand side grow by the inverse of the
    smallest eigenvalue other than 0; below a threshold, which every implementation sets
    differently, the solution is undefined. There is no fixed point to differentiate where the sums
    of the plan are far from the marginals.
    """
    result, truth = call.run(), call.rounded(torch.float64).run()
    marginal_error = truth.marginal_error.detach().nan_to_num(0.0)
    if len(marginal_error) and marginal_error.max() > 10 * call.mass:
        return INF
    plan = truth.plan().detach()
    rows, columns = plan.sum(2), plan.sum(1)
    epsilon = torch.as_tensor(call.arguments["epsilon"]).double().expand(len(plan))
    stiff = [1 + epsilon[:, None] / rho for rho in (truth.problem.rho_a, truth.problem.rho_b)]
    share_a, share_b = ((x * y).rsqrt() for x, y in zip((rows, columns), stiff, strict=True))
    scaled = share_a.nan_to_num(0, 0)[:, :, None] * plan * share_b.nan_to_num(0, 0)[:, None, :]
    eigenvalues = 1 - torch.linalg.svdvals(scaled.nan_to_num(0, 0, 0)) ** 2
    balanced = truth.problem.rho_a == truth.problem.rho_b == INF
    # Singular values descend: the first belongs to the shift.
    eigenvalues = eigenvalues[:, 1:] if balanced else eigenvalues
    least = eigenvalues.min().item() if eigenvalues.numel() else 1.0
    residual = result.gradient_residual.nan_to_num(0).max().item()
    rounding = 1e2 * torch.finfo(call.dtype).eps
    amplified = call.scale / epsilon[epsilon > 0].min().item()
    return INF if least < 1e-7 else (residual + rounding) * amplified / least
