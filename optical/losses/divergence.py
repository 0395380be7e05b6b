"""The Sinkhorn divergence: a converged, debiased distance of sets of vectors, and its module."""

from __future__ import annotations

import functools
import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, get_args, overload

import torch
from torch import Tensor, nn

from optical.backends.problem import Status
from optical.losses.alignment import Reduction
from optical.ot.checks import check_options, values_available
from optical.ot.functional import AlignmentOptions, Cost, sinkhorn_vectors
from optical.ot.result import SinkhornResult

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

MAX_ITER = 5000
# The run at epsilon starts from plans at these multiples of it, solved to STAGE_TOL one after the
# other. The first is annealed from HOTTEST; temperatures in a tensor cannot be annealed, and get
# HOT_STAGES instead. In float64 with Anderson acceleration, all of 1568 problems of 15 to 200
# points with costs up to 20,000 epsilon reach 1e-5 within 1700 iterations. Of 448 across sets, 158
# do not reach 1e-4 within 5000 plain iterations, and 80 not with slow annealing (ratio 0.9).
STAGES, STAGE_TOL, STAGE_MAX_ITER = (4.0**3, 4.0**2, 4.0), 1e-3, 1000
HOTTEST, HOT_STAGES = 4.0**10, (4.0**10, 4.0**8, 4.0**6, 4.0**4)
# Options that replace the schedule by one run.
OVERRIDES = ("anderson", "anneal", "omega")
# Shorter runs are plain: without warm start, acceleration or early stopping.
SHORT = 100


class SolverOptions(AlignmentOptions, total=False):
    """Options of the three solves, without the cost."""

    max_iter: int
    tol: float


class DivergenceOptions(SolverOptions, total=False):
    """Options of ``sinkhorn_divergence``."""

    cost: Cost


class MassArguments(TypedDict, total=False):
    """Masses and padding, as in ``optical.sinkhorn_vectors``."""

    a: Tensor | None
    b: Tensor | None
    mask_a: Tensor | None
    mask_b: Tensor | None
    lengths_a: Tensor | None
    lengths_b: Tensor | None
    cu_seqlens_a: Tensor | None
    cu_seqlens_b: Tensor | None


class DivergenceArguments(DivergenceOptions, MassArguments, total=False):
    """Keyword arguments of ``sinkhorn_divergence``."""

    epsilon: Required[float | Tensor]


class DivergenceResult(NamedTuple):
    """Divergences of a batch, and how their solves ended.

    Attributes:
        value: (batch,) the divergence, NaN where ``status`` is INFEASIBLE.
        marginal_error: (batch,) the largest of the three solves; see ``SinkhornResult``.
        n_iter: (batch,) int32, the largest number of iterations of the three solves, with those of
            the plans that they start from.
        status: (batch,) int32, the worst ``optical.Status`` of the three solves.
    """

    value: Tensor
    marginal_error: Tensor
    n_iter: Tensor
    status: Tensor


class _Side(NamedTuple):
    """Vectors of one side with the arguments that determine their masses."""

    vectors: Tensor
    log_mass: Tensor | None
    mass: Tensor | None
    mask: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None

    def detached(self) -> _Side:
        masses = [x.detach() if isinstance(x, Tensor) else x for x in self[1:]]
        return _Side(self.vectors.detach(), *masses)

    def arguments(self, side: str) -> dict[str, Tensor]:
        """Return the masses given, as arguments of ``sinkhorn_vectors`` for side "a" or "b"."""
        names = f"log_{side}", side, f"mask_{side}", f"lengths_{side}", f"cu_seqlens_{side}"
        given = zip(names, self[1:], strict=True)
        return {name: value for name, value in given if value is not None}


@overload
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    return_result: Literal[False] = False,
    **arguments: Unpack[DivergenceArguments],
) -> Tensor: ...


@overload
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    return_result: Literal[True],
    **arguments: Unpack[DivergenceArguments],
) -> DivergenceResult: ...


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_b: Tensor | None = None,
    return_result: bool = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor | DivergenceResult:
    """Compute the Sinkhorn divergence of sets of vectors, which is 0 for equal sets.

    It is ``value(x, y) - value(x, x) / 2 - value(y, y) / 2 + epsilon / 2 * (sum a - sum b) ** 2``,
    with the value of ``sinkhorn_vectors``. At convergence it is >= 0 for costs such as
    "sqeuclidean", for which ``exp(-cost / epsilon)`` is a positive definite kernel. GeomLoss's
    debiased ``SamplesLoss("sinkhorn", p=2, blur=blur)`` is half of this divergence with
    ``cost="sqeuclidean"`` and ``epsilon=2 * blur ** 2``.

    The three solves run until they converge, from potentials of higher temperatures. On a CPU they
    compute in float64 with Anderson acceleration, because the divergence is a small difference of
    large values. If values are at hand (on a CPU, outside tracing), a RuntimeWarning reports
    problems that have not converged or have no plan.

    Args:
        x, y, log_a, log_b, a, b: see ``sinkhorn_vectors``.
        mask_a, mask_b, lengths_a, lengths_b, cu_seqlens_a, cu_seqlens_b: see ``sinkhorn_vectors``.
        epsilon: see ``sinkhorn_vectors``. Values below 1e-3 of the costs need many iterations.
        return_result: return a DivergenceResult instead of the values alone.
        **options: cost ("cosine" by default, as in ``sinkhorn_vectors``; GeomLoss's is
            "sqeuclidean"), rho (equal for both sides), precision, backend and low_memory:
            see ``sinkhorn_vectors``, and:

            - ``tol``: 1e-5 on a CPU, 1e-4 on other devices, which do not accelerate. Its unit is
              that of the masses, which sum to 1 by default. 0 runs ``max_iter`` plain iterations.
            - ``max_iter``: 5000, at ``epsilon``. Values below 100 run exactly that many plain
              iterations from the potentials 0, unless ``tol`` is given.
            - ``anderson``, ``anneal``, ``omega``: one run from the potentials 0 with these options
              replaces the default described above.
            - ``gradient``: "envelope" by default, exact at convergence. "unroll" differentiates one
              plain run from 0 (``tol`` 1e-4), which converges slowly at small ``epsilon``.

    Returns:
        (batch,), differentiable with respect to x, y and the masses, or a DivergenceResult with it.
        The value is 0 if all rows or all columns of a problem are padding. It is NaN if no plan
        exists, because the sums of fixed masses differ by more than 0.1 %, or an input is NaN.

    Raises:
        TypeError, ValueError, BackendUnsupported, RuntimeError: see ``sinkhorn``. ValueError if
            rho differs between the sides, for which no divergence is defined.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (arXiv 1810.08278); unequal masses: Séjourné, Feydy, Vialard, Trouvé, Peyré,
    "Sinkhorn Divergences for Unbalanced Optimal Transport" (arXiv 1910.12958), definition 5;
    annealing to a warm start: Schmitzer (arXiv 1610.06519), section 3.

    Examples:
        >>> import torch
        >>> from optical import sinkhorn_divergence
        >>> x = torch.eye(3)[None]
        >>> sinkhorn_divergence(x, x.flip(1), epsilon=0.1, cost="sqeuclidean").abs() < 1e-6
        tensor([True])
        >>> sinkhorn_divergence(x, -x, epsilon=0.1, cost="sqeuclidean", return_result=True).status
        tensor([0], dtype=torch.int32)
    """
    for name, vectors in (("x", x), ("y", y)):
        if not isinstance(vectors, Tensor):
            found = type(vectors).__name__
            raise TypeError(f"{name} is a {found}; expected a tensor (batch, n, dim)")
    check_divergence_options("sinkhorn_divergence", epsilon, options)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    wide = x.device.type == "cpu" and options.get("backend", "auto") in ("auto", "cpu", "reference")
    if wide:
        x, y = _in_float64(x), _in_float64(y)
    solver = _Solver(epsilon, options, accelerated=wide and options.get("gradient") != "unroll")
    rows = _Side(x, log_a, a, mask_a, lengths_a, cu_seqlens_a)
    columns = _Side(y, log_b, b, mask_b, lengths_b, cu_seqlens_b)
    solved = [solver.solve(*pair) for pair in ((rows, columns), (rows, rows), (columns, columns))]
    values = [result.value for result, _ in solved]
    value = values[0] - (values[1] + values[2]) / 2
    if not (log_a is log_b is a is b is None):
        excess = _total_mass(rows) - _total_mass(columns)
        value = value + epsilon / 2 * excess**2
    result = _combine(value, solved, dtype, solver.tol)
    if solver.tol > 0 and values_available(result.status):
        _warn_of_failures(result, solver.options, solver.tol)
    return result if return_result else result.value


def check_divergence_options(
    function: str, epsilon: float | Tensor, options: DivergenceOptions | dict[str, Any]
) -> None:
    """Validate the options that can be checked without tensors.

    Args:
        function: the public function or class, for the message about an unknown option.
        epsilon, options: see ``sinkhorn_divergence``.

    Raises:
        TypeError, ValueError: an option has a wrong type or value.
    """
    checked = check_options(function, epsilon=epsilon, **{"max_iter": MAX_ITER, **options})
    if checked.rho_a != checked.rho_b:
        raise ValueError(f"rho is {options['rho']}; expected one strength for both sides")


class _Solver:
    """The options of the three solves, with defaults that depend on no value of the batch.

    A problem therefore gives the same bits alone and in any batch.
    """

    def __init__(
        self, epsilon: float | Tensor, options: DivergenceOptions, accelerated: bool
    ) -> None:
        self.epsilon = epsilon
        self.tol = options.get("tol", 1e-5 if accelerated else 1e-4)
        defaults: dict[str, Any] = {"max_iter": MAX_ITER, "tol": self.tol}
        short = options.get("max_iter", MAX_ITER) < SHORT
        if short:
            defaults["tol"] = 0.0
        replaced = any(name in options for name in OVERRIDES)
        # A warm start would be a constant to the derivative of an unrolled run.
        self.warm = not (short or replaced or self.tol == 0 or options.get("gradient") == "unroll")
        if self.warm and accelerated:
            defaults["anderson"] = 5
        self.options: dict[str, Any] = defaults | {**options}
        if self.warm and not accelerated:
            # In float32, the error of the returned plan may round to slightly more than tol.
            self.options["tol"] = 0.9 * self.tol

    def solve(self, rows: _Side, columns: _Side) -> tuple[SinkhornResult, Tensor]:
        """Solve, and count the iterations.

        The problem within a set takes the same way as that across sets, so that their errors cancel
        for sets that are nearly equal.
        """
        changes: dict[str, Any] = {}
        n_iter: Tensor | int = 0
        if self.warm:
            changes["init"], n_iter = self._warm_start(rows.detached(), columns.detached())
        result = self._run(rows, columns, changes)
        return result, result.n_iter + n_iter

    def _run(self, rows: _Side, columns: _Side, changes: dict[str, Any]) -> SinkhornResult:
        options: dict[str, Any] = {"epsilon": self.epsilon, **self.options, **changes}
        options |= rows.arguments("a") | columns.arguments("b")
        return sinkhorn_vectors(rows.vectors, columns.vectors, **options)

    def _warm_start(self, rows: _Side, columns: _Side) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return potentials at a few times epsilon, and count their iterations."""
        epsilon = self.epsilon.detach() if isinstance(self.epsilon, Tensor) else self.epsilon
        stages = (*HOT_STAGES, *STAGES) if isinstance(epsilon, Tensor) else STAGES
        changes: dict[str, Any] = {
            "tol": max(STAGE_TOL, self.options["tol"]),
            "max_iter": min(STAGE_MAX_ITER, self.options["max_iter"]),
            "gradient": "envelope",
        }
        if not isinstance(epsilon, Tensor):
            changes["anneal"] = (epsilon * HOTTEST, 0.25)
        counts = []
        with torch.no_grad():
            for factor in stages:
                result = self._run(rows, columns, changes | {"epsilon": epsilon * factor})
                changes |= {"anneal": None, "init": (result.f, result.g)}
                counts.append(result.n_iter)
        return changes["init"], torch.stack(counts).sum(0, dtype=torch.int32)


def _in_float64(vectors: Tensor) -> Tensor:
    """Convert floating-point vectors; others are refused by the solver."""
    return vectors.double() if vectors.is_floating_point() else vectors


def _total_mass(side: _Side) -> Tensor | float:
    """(batch,) total mass of one side of each problem, which is 1 if none is given."""
    if side.log_mass is None and side.mass is None:
        return 1.0  # or 0 for a problem without valid vectors, whose divergence is 0
    mass = side.mass if side.log_mass is None else side.log_mass.exp()
    assert mass is not None
    # The gradient of padding is 0, also where that of the sum is NaN.
    mass = torch.where(mass > 0, mass, 0.0)
    if side.offsets is not None:
        return torch.segment_reduce(mass, "sum", offsets=side.offsets)
    if side.mask is not None:
        mass = torch.where(side.mask.bool(), mass, 0.0)
    if side.lengths is not None:
        valid = torch.arange(mass.shape[-1], device=mass.device) < side.lengths[..., None]
        mass = torch.where(valid, mass, 0.0)
    return mass.sum(-1)


def _combine(
    value: Tensor,
    solved: list[tuple[SinkhornResult, Tensor]],
    dtype: torch.dtype,
    tol: float,
) -> DivergenceResult:
    results = [result for result, _ in solved]
    across = results[0].status
    empty = across == int(Status.EMPTY)
    error = functools.reduce(torch.maximum, [result.marginal_error for result in results])
    status = functools.reduce(torch.maximum, [result.status for result in results])
    if tol > 0:  # short runs do not stop at it
        within_tol = (status == int(Status.MAX_ITER)) & (error <= tol)
        status = status.masked_fill(within_tol, int(Status.CONVERGED))
    status = torch.where(empty, across, status)
    n_iter = functools.reduce(torch.maximum, [n_iter for _, n_iter in solved])
    # A product makes the gradient NaN as well, which a gradient scaler must see.
    factor = torch.where(status == int(Status.INFEASIBLE), math.nan, 1.0).to(value.dtype)
    value = (value * factor).masked_fill(empty, 0.0).to(dtype)
    return DivergenceResult(value, error.masked_fill(empty, 0.0).to(dtype), n_iter, status)


def _warn_of_failures(result: DivergenceResult, options: dict[str, Any], tol: float) -> None:
    """Warn, in words that recur, so that Python shows a warning once per place in the code."""
    name = "optical.sinkhorn_divergence"
    if (result.status == int(Status.INFEASIBLE)).any():
        warnings.warn(
            f"{name} is NaN for a problem without a plan: an input is NaN or out of range, or the "
            "total masses of its sides differ; normalise the masses, or relax them with rho",
            RuntimeWarning,
            stacklevel=3,
        )
    unfinished = result.status == int(Status.MAX_ITER)
    if unfinished.any():
        error = result.marginal_error.detach()[unfinished].max().item()
        advice = f"raise max_iter ({options['max_iter']}), epsilon or tol"
        if options.get("gradient") == "unroll":
            advice = 'use gradient="envelope", whose runs are accelerated, or ' + advice
        warnings.warn(
            f"{name} has not converged: the marginal error is {error:.0e}, tol is "
            f"{tol:g}; {advice}",
            RuntimeWarning,
            stacklevel=3,
        )


class SinkhornDivergence(nn.Module):
    """Debiased transport cost between sets of vectors, 0 for equal sets; has no parameters.

    A module around ``optical.sinkhorn_divergence``, which documents the tensors, the options and
    the warnings. It replaces GeomLoss's debiased ``SamplesLoss("sinkhorn", p=2)``, which is half of
    it with ``epsilon=2 * blur ** 2`` and ``rho=2 * reach ** 2``.

    Args:
        epsilon: temperature > 0, in the unit of the cost.
        cost: "sqeuclidean" by default, as in GeomLoss, not "cosine" as in the functions of this
            package; see ``optical.sinkhorn_vectors`` for others.
        reduction: "mean" over the problems of the batch, where a problem without vectors counts as
            0; "sum"; or "none" for one value per problem.
        **options: rho, gradient, max_iter, tol and the other options of
            ``optical.sinkhorn_divergence``.

    Raises:
        TypeError, ValueError: an option is unknown, or has a wrong type or value.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (arXiv 1810.08278).

    Examples:
        >>> import torch
        >>> from optical.losses import SinkhornDivergence
        >>> loss = SinkhornDivergence(epsilon=0.1)
        >>> x = torch.tensor([[[0.0], [1.0]]], requires_grad=True)
        >>> value = loss(x, x.detach() + 2)
        >>> value.backward()
        >>> value.round(decimals=3), x.grad.flatten().round(decimals=3)
        (tensor(4., grad_fn=<RoundBackward1>), tensor([-2., -2.]))
    """

    def __init__(
        self,
        epsilon: float,
        *,
        cost: Cost = "sqeuclidean",
        reduction: Reduction = "mean",
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"epsilon": epsilon, "cost": cost, **options}
        check_divergence_options("SinkhornDivergence", epsilon, {"cost": cost, **options})
        if reduction not in get_args(Reduction):
            expected = ", ".join(repr(name) for name in get_args(Reduction))
            raise ValueError(f"reduction is {reduction!r}; expected one of {expected}")
        self.reduction: Reduction = reduction

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        log_a: Tensor | None = None,
        log_b: Tensor | None = None,
        **masses: Unpack[MassArguments],
    ) -> Tensor:
        """Compute the loss; see ``optical.sinkhorn_divergence`` for the arguments.

        Returns:
            A scalar, or (batch,) with ``reduction="none"``.
        """
        values: Tensor = sinkhorn_divergence(x, y, log_a, log_b, **masses, **self.options)
        if self.reduction == "mean":
            return values.mean()
        if self.reduction == "sum":
            return values.sum()
        return values

    def extra_repr(self) -> str:
        """Return the options, as shown by ``repr``."""
        shown = self.options | {"reduction": self.reduction}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
