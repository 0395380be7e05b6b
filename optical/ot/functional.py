"""Public functions: ``sinkhorn`` for a given cost, and functions of token vectors built on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from optical.backends.problem import Problem, Solution
from optical.ot import autograd, masses, validation
from optical.ot.checks import Lead, check_options, refuse_unknown, split_penalties, unfold
from optical.ot.masses import Masses
from optical.ot.result import SinkhornResult
from optical.ot.validation import Posed

if TYPE_CHECKING:
    from typing_extensions import Never, Unpack


Cost = Literal["cosine", "sqeuclidean", "dot", "euclidean"]
Gradient = Literal["envelope", "implicit", "unroll"]
Precision = Literal["exact", "fast"]
Rho = float | Tensor | tuple[float | Tensor | None, float | Tensor | None] | None


class AlignmentOptions(TypedDict, total=False):
    """Options that ``ot_alignment`` and the losses pass to ``sinkhorn_vectors``."""

    rho: Rho
    omega: float
    anderson: int
    anneal: tuple[float, float] | None
    gradient: Gradient
    precision: Precision
    backend: str
    low_memory: bool


def sinkhorn(
    cost: Tensor,
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
    max_iter: int = 100,
    tol: float = 0.0,
    init: tuple[Tensor, Tensor] | None = None,
    rho: Rho = None,
    omega: float = 1.0,
    anderson: int = 0,
    anneal: tuple[float, float] | None = None,
    gradient: Gradient = "envelope",
    precision: Precision = "exact",
    backend: str = "auto",
    **unknown: Never,
) -> SinkhornResult:
    """Solve a batch of entropy-regularised optimal transport problems.

    The plan is ``exp((f + g - cost) / epsilon + log_a + log_b)``, so the regulariser is
    ``epsilon * KL(plan || a b)``. One iteration updates f, then g.
    ``optical/backends/reference.py`` defines the iterations in plain PyTorch.

    Args:
        cost: (batch, n, m), or with any leading dimensions, or (n, m); the leading dimensions of
            all other arguments are the same. float64, float32, float16 or bfloat16. Half precision
            is converted to float32. +inf forbids a pair. Entries of padding are never used. A cost
            that is expanded (stride 0) or transposed is not copied on a CPU.
        log_a: (batch, n) logarithm of the row masses, -inf for padding. If None, the valid rows of
            a problem have equal masses that sum to 1.
        log_b: (batch, m) logarithm of the column masses, like ``log_a``.
        epsilon: temperature > 0, a float or a tensor (batch,) or (). The gradient of ``value`` with
            respect to it is ``KL(plan || a b)``; everything else is constant in it. The values of a
            tensor are not validated; ``status`` reports those that are not positive and finite.
            Called ``reg`` in POT and ``epsilon`` in OTT; with GeomLoss's ``SamplesLoss(p=2)`` and
            the cost ``|x - y| ** 2`` it is ``2 * blur ** 2``.
        a, b: (batch, n) and (batch, m), the masses themselves instead of ``log_a`` and ``log_b``.
            They are differentiable; the gradient of a mass of 0 is 0.
        mask_a, mask_b: (batch, n) and (batch, m), bool or 0/1 numbers; 0 marks padding. Another
            number is an error on a CPU, and makes the problem INFEASIBLE elsewhere. For an additive
            mask (0 and -inf), pass ``mask == 0``.
        lengths_a, lengths_b: (batch,) integers; rows (columns) from this index on are padding.
        max_iter: number of iterations (POT: ``numItermax``; OTT: ``max_iterations``).
        tol: a problem stops after the first iteration whose row and column sums differ by at most
            ``tol`` in L1 from those of the optimal plan, a and b or their relaxed values (POT:
            ``stopThr``; OTT: ``threshold``). 0 runs exactly ``max_iter`` iterations.
        init: (f, g), initial potentials shaped like ``log_a`` and ``log_b``; zeros if None. They
            receive no gradient.
        rho: None fixes both marginals. A number > 0 replaces them by the penalties
            ``rho * KL(row sums || a)`` and ``rho * KL(column sums || b)``. A pair has one strength
            per side, where None or inf fixes the marginal. A tensor (batch,) has one strength per
            problem, for both sides or in a pair with None; it receives no gradient. Called
            ``reg_m`` in POT; OTT's ``tau_a`` is ``rho_a / (rho_a + epsilon)``; with GeomLoss's
            ``SamplesLoss(p=2)`` and the cost ``|x - y| ** 2`` it is ``2 * reach ** 2``.
        omega: over-relaxation in (0, 2); 1 is none. 1.5 to 1.9 accelerates slow problems (OTT:
            ``momentum``).
        anderson: number of past iterates in Anderson acceleration, 1 to 16; 0 is none. With
            ``tol``, it saves many iterations on slow problems.
        anneal: (start, ratio); iteration k runs at temperature
            ``max(epsilon, start * ratio ** k)``, which must be ``epsilon`` for the last one. With
            GeomLoss's ``SamplesLoss(p=2)``, ``(2 * diameter ** 2, scaling ** 2)``; OTT: an
            ``Epsilon`` schedule.
        gradient: derivative of ``value`` and ``value_linear`` with respect to cost, log_a and
            log_b:

            - "envelope" holds the plan fixed. It is exact for ``value`` at convergence. OPTICAL
              uses it for ``value_linear`` too, of which it is not the gradient; docs/method.md
              measures errors from 0 to 82 %.
            - "implicit" is the total derivative at the fixed point, exact for both at convergence.
              With two fixed marginals, it applies to changes of the masses that keep their sums
              equal.
            - "unroll" is the total derivative of the iterations run, converged or not; f and g are
              differentiable too. It cannot be combined with ``anderson``.

            The plan, its logarithm and its products carry the same derivative with "implicit" and
            "unroll", and are constants with "envelope".
        precision: "exact" computes in float32 (float64 for float64 inputs). "fast" allows a
            backend to store the plan of the iterations in float16, which changes the result like
            errors of the cost of up to ``epsilon / 2048``; the last iteration, values and
            gradients use the exact costs. docs/dev/kernels.md and docs/dev/cuda.md state which
            problems the Triton and CUDA backends solve this way; all others are solved exactly.
        backend: "auto", "cuda", "triton", "cpu" or "reference". The environment variable
            OPTICAL_BACKEND replaces "auto". ``optical.backends.explain`` reports the choice.

    Returns:
        A SinkhornResult. Problems in which all rows or all columns are padding have value 0 and
        gradient 0. A problem with an input that is NaN or out of range has NaN outputs and NaN
        gradients of its own inputs; the rest of the batch is unaffected.

        Packages define the entropy differently. At convergence with fixed marginals that sum to 1,
        POT's ``reg_type="entropy"`` value is this value minus ``epsilon * (H(a) + H(b))``, where
        ``H(a) = -sum a log a``. POT's ``reg_type="KL"`` and OTT's ``reg_ot_cost`` agree with this
        value; ``SamplesLoss(p=2)`` returns half of it, because its cost is ``|x - y| ** 2 / 2``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        BackendUnsupported: the backend requested by name cannot solve the problem.
        RuntimeError: a second derivative is requested; ``optical.backends.reference.sinkhorn`` has
            one.

    Source: Cuturi, "Sinkhorn Distances" (NeurIPS 2013), algorithm 1; log domain and annealing:
    Schmitzer (arXiv 1610.06519); rho: Chizat et al. (arXiv 1607.05816); omega: Thibault et al.
    (arXiv 1711.01851); implicit: Luise et al., "Differential Properties of Sinkhorn Approximation"
    (arXiv 1805.11897), section 4.

    Examples:
        >>> import torch
        >>> from optical import sinkhorn
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> result = sinkhorn(cost, epsilon=0.1)
        >>> result.plan().round(decimals=3)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    if unknown:
        refuse_unknown("sinkhorn", unknown, _arguments(sinkhorn))
    rho, strengths = split_penalties(rho)
    options = check_options(
        "sinkhorn",
        epsilon=epsilon,
        max_iter=max_iter,
        tol=tol,
        rho=rho,
        omega=omega,
        anderson=anderson,
        anneal=anneal,
        gradient=gradient,
        precision=precision,
        backend=backend,
    )
    rows = Masses(masses.COST_ROWS, log_a, mask_a, lengths_a, None, a)
    columns = Masses(masses.COST_COLUMNS, log_b, mask_b, lengths_b, None, b)
    posed = validation.problem_of_cost(cost, rows, columns, epsilon, init, options)
    return _solve(posed.with_penalties(strengths))


def sinkhorn_vectors(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    cost: Cost = "cosine",
    epsilon: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_b: Tensor | None = None,
    max_iter: int = 100,
    tol: float = 0.0,
    init: tuple[Tensor, Tensor] | None = None,
    rho: Rho = None,
    omega: float = 1.0,
    anderson: int = 0,
    anneal: tuple[float, float] | None = None,
    gradient: Gradient = "envelope",
    precision: Precision = "exact",
    backend: str = "auto",
    low_memory: bool = False,
    **unknown: Never,
) -> SinkhornResult:
    """Solve a batch of transport problems between sets of vectors, whose cost is computed inside.

    Args:
        x: (batch, n, dim), float64, float32, float16 or bfloat16, one vector per row; x and y may
            differ in dtype. Half precision is converted exactly to float32 before any computation.
            Vectors of padding are never used. Any leading dimensions, or none, may stand for
            (batch); those of x and y are broadcast, so that one set of vectors may meet many.
        y: (batch, m, dim), one vector per column.
        log_a, log_b: log-masses as in ``sinkhorn``; (N,) and (M,) for packed problems.
        cost: "cosine" is ``1 - x.y / (|x| |y|)``, and 1 if a vector is zero; "sqeuclidean" is
            ``|x - y| ** 2``; "dot" is ``-x.y``; "euclidean" is ``|x - y|``, for padded problems
            only, whose matrix is stored.
        cu_seqlens_a, cu_seqlens_b: (batch + 1,) int32 or int64 offsets of packed problems, both or
            neither, instead of masks and lengths. x is then (N, dim), y is (M, dim), and rows
            ``cu_seqlens_a[i]`` to ``cu_seqlens_a[i + 1]`` belong to problem i. Offsets on a GPU are
            not validated.
        low_memory: allow a slower run that stores no (n, m) matrix; results agree to rounding.
        a, b, mask_a, mask_b, lengths_a, lengths_b: see ``sinkhorn``.
        init: see ``sinkhorn``; shaped like the masses.
        epsilon, max_iter, tol, rho, omega, anderson, anneal: see ``sinkhorn``.
        gradient, precision, backend: see ``sinkhorn``.

    Returns:
        A SinkhornResult, differentiable with respect to x, y, log_a and log_b.

    Raises:
        TypeError, ValueError, BackendUnsupported, RuntimeError: see ``sinkhorn``.

    Examples:
        >>> import torch
        >>> from optical import sinkhorn_vectors
        >>> x, y = torch.eye(3), torch.eye(3)[[2, 0, 1, 1]]
        >>> offsets = torch.tensor([0, 3]), torch.tensor([0, 4])
        >>> result = sinkhorn_vectors(
        ...     x, y, epsilon=0.05, cu_seqlens_a=offsets[0], cu_seqlens_b=offsets[1]
        ... )
        >>> result.value_linear.round(decimals=2)
        tensor([0.1700])
    """
    if unknown:
        refuse_unknown("sinkhorn_vectors", unknown, _arguments(sinkhorn_vectors))
    rho, strengths = split_penalties(rho)
    options = check_options(
        "sinkhorn_vectors",
        epsilon=epsilon,
        max_iter=max_iter,
        tol=tol,
        rho=rho,
        omega=omega,
        anderson=anderson,
        anneal=anneal,
        gradient=gradient,
        precision=precision,
        backend=backend,
        low_memory=low_memory,
        cost=cost,
    )
    rows = Masses(masses.X, log_a, mask_a, lengths_a, cu_seqlens_a, a)
    columns = Masses(masses.Y, log_b, mask_b, lengths_b, cu_seqlens_b, b)
    posed = validation.problem_of_vectors(
        x, y, rows, columns, cost, epsilon, init, options, broadcast=True
    )
    return _solve(posed.with_penalties(strengths))


def ot_alignment(
    student: Tensor,
    teacher: Tensor,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    *,
    cost: Cost = "cosine",
    epsilon: float | Tensor = 0.05,
    max_iter: int = 50,
    tol: float = 0.0,
    **options: Unpack[AlignmentOptions],
) -> Tensor:
    """Compute the transport cost between the tokens of each student text and its teacher text.

    The result is ``<plan, cost(student_i, teacher_j)>``, where the plan is the Sinkhorn coupling of
    the two sets of tokens with equal masses. The texts may differ in length and word order.

    Args:
        student: (batch, n, dim) token vectors, float64, float32, float16 or bfloat16; any leading
            dimensions, or none, may stand for (batch).
        teacher: (batch, m, dim) token vectors. They receive a gradient if they require one.
        student_mask: (batch, n), bool or 0/1 numbers, such as an attention mask; 0 marks padding.
            All tokens are valid if None. Vectors of padding are never used, and their gradient is
            exactly 0.
        teacher_mask: (batch, m), like ``student_mask``.
        cost: "cosine", "sqeuclidean" or "dot"; see ``optical.sinkhorn_vectors``.
        epsilon, max_iter, tol: see ``optical.sinkhorn``.
        **options: rho, omega, anderson, anneal, gradient, precision, backend and low_memory; see
            ``optical.sinkhorn_vectors``. The default gradient "envelope" treats the plan as a
            constant, as OPTICAL does; "implicit" is the total derivative.

    Returns:
        (batch,) float32 (float64 for float64 vectors), 0 if either text has no valid token.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        BackendUnsupported: the backend requested by name cannot solve the problem.

    Source: Huang, Yu, Allan, "Improving Cross-lingual Information Retrieval on Low-Resource
    Languages via Optimal Transport Distillation" (OPTICAL, WSDM 2023, arXiv 2301.12566).

    Examples:
        >>> import torch
        >>> from optical import ot_alignment
        >>> teacher = torch.eye(3)[None]
        >>> ot_alignment(teacher.flip(1), teacher).round(decimals=3)   # the order of tokens is free
        tensor([0.])
    """
    given = student, teacher, student_mask, teacher_mask, cost, epsilon
    problem, lead = alignment_problem(*given, max_iter=max_iter, tol=tol, **options)
    return unfold(autograd.transport_cost(problem), lead)


def alignment_problem(
    student: Tensor,
    teacher: Tensor,
    student_mask: Tensor | None,
    teacher_mask: Tensor | None,
    cost: Cost,
    epsilon: float | Tensor,
    **options: Any,
) -> tuple[Problem, Lead | None]:
    """Return the problem whose transport cost ``ot_alignment`` computes, and its folded dimensions.

    The arguments are those of ``ot_alignment``, which says what is raised.
    """
    checked = check_options("ot_alignment", epsilon=epsilon, cost=cost, **options)
    rows = Masses(masses.STUDENT, None, student_mask)
    columns = Masses(masses.TEACHER, None, teacher_mask)
    problem, lead, learnt, _ = validation.problem_of_vectors(
        student, teacher, rows, columns, cost, epsilon, None, checked
    )
    if learnt is not None:
        raise ValueError(
            "epsilon requires grad, which the transport cost does not give; expected "
            "epsilon.detach(), or the value of sinkhorn_vectors"
        )
    return problem, lead


def _solve(posed: Posed) -> SinkhornResult:
    problem, lead, epsilon, rho = posed
    solved = solution = autograd.solve(problem)
    if rho is not None:
        solution = solution._replace(
            value=solved.value * rho,
            value_linear=solved.value_linear * rho,
            f=solved.f * rho[:, None],
            g=solved.g * rho[:, None],
        )
    if epsilon is not None:
        # d value / d epsilon = KL(plan || a b) at convergence, by the envelope theorem.
        divergence = _divergence_of_plan(problem, solved)
        value = solution.value + divergence * (epsilon - epsilon.detach())
        solution = solution._replace(value=value)
    return SinkhornResult.of(problem, solution, lead, (solved.f, solved.g))


def _divergence_of_plan(problem: Problem, solution: Solution) -> Tensor:
    """(batch,) KL(plan || a b) of converged problems, without gradient; 0 if they are not finite.

    It is what the value has beside the transport cost and the penalties, divided by epsilon.
    """
    rest = (solution.value - solution.value_linear).detach()
    for rho, log_mass, potential, offsets in (
        (problem.rho_a, problem.log_a, solution.f, problem.cu_a),
        (problem.rho_b, problem.log_b, solution.g, problem.cu_b),
    ):
        if rho != math.inf:
            # rho KL(sums || masses), where the sums are masses * exp(-potential / rho).
            exponent, mass = -potential.detach() / rho, log_mass.detach().exp()
            terms = rho * mass * (exponent.exp() * exponent - torch.expm1(exponent))
            rest = rest - _per_problem(terms, offsets)
    divergence = rest / problem.epsilon
    return torch.where(divergence.isfinite(), divergence, 0.0)


def _arguments(function: Any) -> list[str]:
    code = function.__code__
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _per_problem(values: Tensor, offsets: Tensor | None) -> Tensor:
    """(batch,) sum over the rows (columns) of each problem."""
    if offsets is None:
        return values.sum(1)
    return torch.segment_reduce(values, "sum", offsets=offsets)
