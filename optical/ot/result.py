"""``SinkhornResult``, the return type of the public functions."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optical.backends.dense import PaddedProblem
from optical.backends.problem import Problem, Solution
from optical.ot import autograd
from optical.ot.checks import (
    Lead,
    check_device,
    check_floating,
    check_shape,
    fold,
    tracing,
    unfold,
)


@dataclass(frozen=True)
class SinkhornResult:
    """Solution of a batch of problems, as tensors on the device of the cost.

    ``value`` and ``value_linear`` are differentiable. So are the plan, its logarithm and its
    products with ``gradient="implicit"`` (total derivatives at the fixed point) and, with f and g,
    with ``gradient="unroll"`` (of the iterations run); with "envelope" they are constants.

    In the shapes below, (batch) stands for the leading dimensions of the cost or the vectors: none
    for a single problem (n, m). For packed problems, (batch, n) and (batch, m) are (N,) and (M,).

    Attributes:
        value: (batch) objective of the returned plan,
            ``<plan, cost> + epsilon * KL(plan || a b)``, plus ``rho * KL(sums || masses)`` for each
            side that ``rho`` relaxes.
        value_linear: (batch) transport cost ``<plan, cost>``.
        f: (batch, n) potential of the rows, 0 for padding.
        g: (batch, m) potential of the columns, 0 for padding.
        marginal_error: (batch) L1 distance of the plan's sums from those of the optimal plan: a
            and b, or ``a * exp(-f / rho_a)`` and ``b * exp(-g / rho_b)`` on a relaxed side.
        n_iter: (batch) int32, number of iterations run.
        status: (batch) int32, an ``optical.Status``. CONVERGED: ``marginal_error`` is at most
            ``tol``. MAX_ITER: it is not, after ``max_iter`` iterations or at the resolution of the
            dtype. EMPTY: all rows or all columns are padding; every output is 0. INFEASIBLE: an
            input is NaN or out of range, or an output overflowed, and the outputs and gradients of
            the problem are NaN; or marginals are fixed and their total masses differ by more than
            0.1 %, or a valid row or column has no allowed pair, and the outputs are those of the
            iterations.
        gradient_residual: (batch) with ``gradient="implicit"``, the relative residual of the
            linear system behind the gradient of ``value_linear``; otherwise 0.
    """

    value: Tensor
    value_linear: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iter: Tensor
    status: Tensor
    gradient_residual: Tensor
    problem: Problem = field(repr=False)
    lead: Lead | None = field(default=None, repr=False)
    constant: bool = field(default=False, repr=False)
    versions: list[int] | None = field(default=None, repr=False)
    potentials: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        problem: Problem,
        solution: Solution,
        lead: Lead | None,
        potentials: tuple[Tensor, Tensor],
    ) -> SinkhornResult:
        """Wrap the solution of a problem whose leading dimensions ``lead`` were merged.

        ``potentials`` are those of ``problem``; they are f and g unless it was divided by rho.
        """
        constant = problem.gradient == "envelope" and autograd.needs_gradient(problem)
        versions = None if tracing() else _versions(problem, *potentials)
        if constant and not _leaves(problem):
            # The result must not keep the graph of the inputs alive.
            problem = detached(problem)
        outputs: tuple[Tensor, ...] = (*solution[:7], solution.residual)
        if lead is not None:
            outputs = tuple(unfold(x, lead) for x in outputs)
        kept = None if potentials[0] is solution.f else potentials
        fields: tuple[Any, ...] = (*outputs, problem, lead, constant, versions, kept)
        if tracing():  # which PyTorch 2.11 and older do not do below
            return cls(*fields)
        # The constructor of a frozen class sets every field by a call.
        result = object.__new__(cls)
        result.__dict__.update(zip(_FIELDS, fields, strict=True))
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose tensors have version counters of their own."""
        self.__dict__.update(state)
        potentials = (self.f, self.g) if self.potentials is None else self.potentials
        self.__dict__["versions"] = _versions(self.problem, *potentials)

    def plan(self) -> Tensor:
        """Compute the plan (batch, n, m) from the potentials; it is not stored.

        Padding and forbidden pairs are exactly 0. Packed problems are padded to the longest one,
        whose length is read from the device.

        Raises:
            RuntimeError: an input of the solve, f or g has been modified in place since.

        Examples:
            >>> import torch
            >>> from optical import sinkhorn
            >>> result = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
            >>> result.plan().sum().round(decimals=3)
            tensor(1.)
        """
        return self._plan("plan", log=False)

    def log_plan(self) -> Tensor:
        """Compute the logarithm of the plan (batch, n, m), exact where the plan underflows.

        It is ``(f + g - cost) / epsilon + log_a + log_b``, and -inf for padding and forbidden
        pairs.

        Raises:
            RuntimeError: an input of the solve, f or g has been modified in place since.

        Examples:
            >>> import torch
            >>> from optical import sinkhorn
            >>> result = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.01)
            >>> result.log_plan().round()
            tensor([[  -1., -101.],
                    [-101.,   -1.]])
        """
        return self._plan("log_plan", log=True)

    def apply_plan(self, v: Tensor, transpose: bool = False) -> Tensor:
        """Multiply the plan with vectors; differentiable with respect to v.

        With ``gradient="implicit"`` or "unroll" it is differentiable like ``plan`` as well, and
        then stores the plan.

        Args:
            v: (batch, m, k), one vector per column (packed: (M, k)); with ``transpose``,
                (batch, n, k), one per row. Vectors of padding are never used.
            transpose: multiply the transposed plan.

        Returns:
            (batch, n, k) in the dtype of f, or (batch, m, k) with ``transpose``. The rows of
            ``apply_plan(y) / apply_plan(ones)`` are the barycentric images of the rows' tokens.

        Raises:
            TypeError, ValueError: v has a wrong type, dtype, shape or device.
            RuntimeError: an input of the solve, f or g has been modified in place since.

        Examples:
            >>> import torch
            >>> from optical import sinkhorn
            >>> result = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.05)
            >>> result.apply_plan(torch.tensor([[3.0], [5.0]])).round(decimals=3)
            tensor([[1.5000],
                    [2.5000]])
        """
        potential = self.f if transpose else self.g
        layout = "one vector per row" if transpose else "one vector per column"
        dim = potential.dim() + 1
        check_floating("v", v, f"{dim} dimensions, {layout}", dim)
        check_shape("v", v, (*potential.shape, v.shape[-1]), layout)
        check_device("v", v, "the result", potential)
        v = v.to(self.f.dtype)
        if self.lead is not None:
            v = fold(v, self.lead)
        problem, f, g = self._inputs("apply_plan")
        constant = detached(problem)
        product = autograd.apply_plan(constant, f.detach(), g.detach(), v, transpose)
        if not self.constant and self._differentiable(problem, f, g):
            padded = PaddedProblem(problem)
            source, target = (padded.a, padded.b) if transpose else (padded.b, padded.a)
            plan = autograd.plan(padded.padded, padded.a.pad(f), padded.b.pad(g), False)
            log_mass = padded.padded.log_a if transpose else padded.padded.log_b
            v = torch.where((log_mass != -math.inf)[:, :, None], source.pad(v.detach()), 0.0)
            with torch.autocast(v.device.type, enabled=False):
                by_plan = target.pack((plan.mT if transpose else plan) @ v)
            # The value and the gradient of v are the backend's, whose bits no thread changes.
            product = product + (by_plan - by_plan.detach())
        return unfold(product, self.lead)

    def assignment(self, one_to_one: bool = False) -> Tensor:
        """Return the hard assignment: the column that each row sends most of its mass to.

        Args:
            one_to_one: each column at most once, by the assignment that maximises the sum of
                ``log_plan`` (``scipy.optimize.linear_sum_assignment``, on the CPU; requires SciPy).

        Returns:
            (batch, n) int64 indices of columns; -1 for padding, for rows without an allowed pair,
            and for rows left over by ``one_to_one``. Packed problems are padded.

        Raises:
            ImportError: SciPy is not installed.
            RuntimeError: an input of the solve, f or g has been modified in place since.

        Examples:
            >>> import torch
            >>> from optical import sinkhorn
            >>> cost = torch.tensor([[0.0, 1.0, 2.0], [0.1, 0.0, 2.0]])
            >>> sinkhorn(cost, epsilon=0.1, rho=0.5).assignment()
            tensor([0, 1])
        """
        with torch.no_grad():
            log_plan = self.log_plan()
        best, column = log_plan.max(-1) if log_plan.shape[-1] else (log_plan.sum(-1),) * 2
        if not one_to_one:
            return torch.where(best > -math.inf, column, -1).to(torch.int64)
        from scipy.optimize import linear_sum_assignment

        flat = log_plan.reshape(-1, *log_plan.shape[-2:]).double().cpu()
        result = torch.full(flat.shape[:2], -1, dtype=torch.int64)
        for i, scores in enumerate(flat):
            allowed = scores > -math.inf
            finite = torch.where(allowed, scores, 0.0)
            # A forbidden pair costs more than any set of allowed ones can save.
            spread = (finite.max() - finite.min() + 1) if finite.numel() else 1.0
            penalty = finite.amin() - spread * (min(scores.shape) + 1) if finite.numel() else 0.0
            rows, columns = linear_sum_assignment(
                torch.where(allowed, scores, penalty).nan_to_num().numpy(), maximize=True
            )
            rows, columns = torch.as_tensor(rows), torch.as_tensor(columns)
            kept = allowed[rows, columns]
            result[i, rows[kept]] = columns[kept]
        return result.view(log_plan.shape[:-1]).to(log_plan.device)

    def sample(self, k: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw k pairs per problem from the plan, with replacement, on its device.

        Args:
            k: number of pairs.
            generator: of the plan's device; the default one if None.

        Returns:
            Indices of rows and of columns, each (batch, k) int64; -1 for problems whose plan has no
            mass. Packed problems count rows and columns within each problem.

        Raises:
            ValueError: k is negative.
            RuntimeError: an input of the solve, f or g has been modified in place since.

        Examples:
            >>> import torch
            >>> from optical import sinkhorn
            >>> result = sinkhorn(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), epsilon=0.1)
            >>> rows, columns = result.sample(4)
            >>> torch.equal(rows, columns)
            True
        """
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k is a {type(k).__name__}; expected an int >= 0")
        if k < 0:
            raise ValueError(f"k is {k}; expected an int >= 0")
        with torch.no_grad():
            plan = self.plan()
        flat = plan.flatten(-2)
        if not flat.shape[-1]:
            none = flat.new_full((*flat.shape[:-1], k), -1, dtype=torch.int64)
            return none, none.clone()
        # The inverse of the distribution function, which has no limit on the number of pairs.
        below = flat.double().cumsum(-1)
        total = below[..., -1:]
        drawn = torch.rand(
            (*flat.shape[:-1], k), dtype=torch.float64, device=flat.device, generator=generator
        )
        index = torch.searchsorted(below, drawn * total, right=True)
        # Rounding may reach the end; the last pair with mass is the first to have all of it.
        last = torch.searchsorted(below, total.contiguous())
        index = torch.where(total > 0, torch.minimum(index, last), -1)
        rows = torch.where(index < 0, -1, index // plan.shape[-1])
        return rows, torch.where(index < 0, -1, index % plan.shape[-1])

    def _plan(self, name: str, log: bool) -> Tensor:
        problem, f, g = self._inputs(name)
        if self.constant:
            problem = detached(problem)
            if torch.is_grad_enabled() and not tracing():
                _warn_constant()
        padded = PaddedProblem(problem)
        plan = autograd.plan(padded.padded, padded.a.pad(f), padded.b.pad(g), log)
        return plan if self.lead is None else plan.reshape((*self.lead, *plan.shape[1:]))

    def _inputs(self, name: str) -> tuple[Problem, Tensor, Tensor]:
        """Return the problem and its potentials, if they are those of the solve."""
        f, g = (self.f, self.g) if self.potentials is None else self.potentials
        if self.versions is not None and not tracing():
            found = _versions(self.problem, f, g)
            if found is not None and found != self.versions:
                raise RuntimeError(
                    f"{name}() reads {_changed(self.problem, self.versions, found)}, which has "
                    f"been modified in place since the solve; call {name}() before, or solve a "
                    "clone"
                )
        if self.lead is not None and self.potentials is None:
            f, g = fold(f, self.lead), fold(g, self.lead)
        return self.problem, f, g

    def _differentiable(self, problem: Problem, f: Tensor, g: Tensor) -> bool:
        if problem.gradient == "envelope":
            return False
        transformed = torch._C._are_functorch_transforms_active()
        recorded = autograd.needs_gradient(problem) or f.requires_grad or g.requires_grad
        return recorded or (transformed and torch.is_grad_enabled())


_FIELDS = tuple(SinkhornResult.__dataclass_fields__)


def _leaves(problem: Problem) -> bool:
    """Whether no tensor has a graph behind it."""
    x, y, log_a, log_b = problem.x, problem.y, problem.log_a, problem.log_b
    return x.is_leaf and (y is None or y.is_leaf) and log_a.is_leaf and log_b.is_leaf


def detached(problem: Problem) -> Problem:
    """Return the problem with its tensors detached from the autograd graph."""
    fields: list[Any] = [x.detach() if isinstance(x, Tensor) else x for x in problem]
    return Problem(*fields)


def _versions(problem: Problem, f: Tensor, g: Tensor) -> list[int] | None:
    """Return the version counters of what a plan is computed from."""
    return autograd.versions(
        (
            *(problem.x, problem.y, problem.cu_a, problem.cu_b),
            *(problem.log_a, problem.log_b, problem.epsilon, f, g),
        )
    )


def _changed(problem: Problem, before: list[int], after: list[int]) -> str:
    names = "x", "y", "cu_a", "cu_b", "log_a", "log_b", "epsilon", "f", "g"
    public = {"x": "cost" if problem.y is None else "x", "cu_a": "cu_seqlens_a"}
    public["cu_b"] = "cu_seqlens_b"
    changed = [n for n, a, b in zip(names, before, after, strict=True) if a != b]
    return public.get(changed[0], changed[0])


@functools.cache
def _warn_constant() -> None:
    warnings.warn(
        "the plan is a constant with gradient='envelope': no gradient flows through plan() and "
        "log_plan(); use gradient='implicit' or 'unroll', or value and value_linear",
        UserWarning,
        stacklevel=4,
    )
