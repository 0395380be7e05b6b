"""The functions of the package: ``sinkhorn`` and what is built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor

from optical import inputs, ops
from optical.arguments import Arguments, Status
from optical.checks import check_options
from optical.inputs import Cloud
from optical.result import SinkhornResult, detached

if TYPE_CHECKING:
    from typing_extensions import Unpack

Cost = Literal["cosine", "sqeuclidean", "dot"]
Gradient = Literal["envelope", "implicit", "unroll"]
Precision = Literal["exact", "fast"]
Rho = float | tuple[float | None, float | None] | None


class AlignmentOptions(TypedDict, total=False):
    """The options that ``ot_alignment`` and the losses pass on to ``sinkhorn_vectors``."""

    rho: Rho
    omega: float
    anderson: int
    anneal: tuple[float, float] | None
    gradient: Gradient
    precision: Precision
    backend: str
    low_memory: bool


class DivergenceOptions(AlignmentOptions, total=False):
    """The options of ``sinkhorn_divergence``."""

    cost: Cost
    max_iter: int
    tol: float


def sinkhorn(
    cost: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
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
) -> SinkhornResult:
    """Solve a batch of entropy-regularised optimal transport problems.

    ``plan = exp((f + g - cost) / epsilon + log a + log b)``, the entropy being ``KL(plan || a b)``.
    One iteration updates f, then g. ``optical/reference.py`` is the definition.

    Args:
        cost: (batch, n, m) float64/32/16 or bfloat16. Float16 and bfloat16 are computed in float32.
            +inf forbids a pair. Entries of absent rows and columns are never read as numbers.
        log_a: (batch, n) logarithm of the row masses; -inf means absent (padding). When None, every
            present row weighs the same and together they weigh 1.
        log_b: (batch, m) the same for the columns.
        epsilon: temperature, > 0 (POT: reg; OTT: epsilon; GeomLoss: blur ** p). A float, or a
            tensor (batch,), whose values only ``status`` checks. It receives no gradient.
        mask_a, mask_b: (batch, n) and (batch, m), bool or 0/1 numbers; False means absent.
        lengths_a, lengths_b: (batch,) integers: what follows the first ``length`` lines is absent.
        max_iter: iterations to run (POT: numItermax; OTT: max_iterations).
        tol: a problem stops after the first iteration whose row sums are within tol, in L1, of
            those wanted (POT: stopThr; OTT: threshold). 0 runs exactly max_iter iterations.
        init: (f, g), potentials to start from, shaped like log_a and log_b; zeros when None. They
            receive no gradient.
        rho: None keeps both marginals. A number > 0 replaces them by penalties
            ``rho * KL(row sums || a)`` and ``rho * KL(column sums || b)``; a pair gives each side
            its own, None or inf fixing one side (POT: ``reg_m``; OTT:
            ``tau_a = rho_a / (rho_a + epsilon)``; GeomLoss: reach ** p).
        omega: over-relaxation in (0, 2); 1 is none, 1.5 to 1.9 helps hard problems (OTT: momentum).
        anderson: how many past iterates the acceleration may use, 1 to 16; 0 is none. With
            ``tol``, far fewer iterations where plain ones crawl.
        anneal: (start, ratio): iteration k runs at the temperature max(epsilon, start * ratio ** k)
            (GeomLoss: ``diameter ** p`` and ``scaling ** p``; OTT: an Epsilon schedule).
        gradient: how ``value`` and ``value_linear`` are differentiated with respect to cost, log_a
            and log_b. "envelope" holds the plan fixed: exact for ``value`` at convergence; it is
            OPTICAL's choice for ``value_linear`` too, of which it is not the true gradient and can
            be most of the way off (docs/method.md measures 0 to 82 %). "implicit" is the total
            derivative at the fixed point, exact for both at convergence; with two fixed marginals
            it means changes of the masses that keep their sums equal. "unroll" is the total
            derivative of the iterations that were run, potentials included, converged or not; it
            cannot be combined with anderson.
        precision: "exact" computes in float32 (float64 for float64 inputs) throughout. "fast" lets
            a backend keep the plan of the iterations in float16, which changes the result as costs
            do that are off by up to epsilon / 2048; the last iteration, values and gradients are
            made from the true costs. The Triton backend uses it for padded problems that are too
            large for its registers (docs/kernels.md), at 2 n m bytes each; the CUDA backend for
            balanced ones with a side of more than 32 and 16 iterations or more (docs/cuda.md); what
            else is asked of them, and the other backends, compute exactly.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; the environment variable
            OPTICAL_BACKEND replaces "auto". ``optical.backends.explain`` says which one serves a
            problem and why.

    Returns:
        SinkhornResult. A problem with one side entirely absent has value 0 and gradient 0.

        Other packages count the entropy differently. At convergence with fixed marginals that sum
        to 1, POT's ``reg_type="entropy"`` value is ours minus ``epsilon * (H(a) + H(b))``, where
        ``H(a) = -sum a log a``; POT's ``reg_type="KL"``, OTT's ``ent_reg_cost`` and GeomLoss's
        value are ours.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        BackendUnsupported: the backend asked for by name cannot serve the problem.
        RuntimeError: the gradient is differentiated again; ``optical.reference.sinkhorn`` can be.

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
    options = check_options(
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
    rows = Cloud(inputs.ROWS, cost, log_a, mask_a, lengths_a)
    columns = Cloud(inputs.COLUMNS, cost, log_b, mask_b, lengths_b)
    return _solve(inputs.of_cost(rows, columns, epsilon, init, options))


def sinkhorn_vectors(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    cost: Cost = "cosine",
    epsilon: float | Tensor,
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
) -> SinkhornResult:
    """Solve a batch of transport problems between clouds of vectors; the cost is built inside.

    Args:
        x: (batch, n, dim) float64/32/16 or bfloat16, one vector per row; x and y may differ in
            dtype. Half precision is converted to float32, exactly, before anything is computed.
            Vectors of absent tokens are never read as numbers.
        y: (batch, m, dim), one vector per column.
        log_a, log_b: masses as in ``sinkhorn``; for packed problems (N,) and (M,).
        cost: "cosine" ``1 - x.y / (|x| |y|)``, where a zero vector is at distance 1 from
            everything; "sqeuclidean" ``|x - y| ** 2``; "dot" ``-x.y``.
        cu_seqlens_a, cu_seqlens_b: (batch + 1,) int32 or int64, both or neither: the problems stand
            behind one another, x is (N, dim), y is (M, dim), and rows ``cu_seqlens_a[i]`` to
            ``cu_seqlens_a[i + 1]`` belong to problem i. Instead of masks and lengths. On a GPU
            their values are not checked.
        low_memory: allow a slower run that holds no (n, m) matrix; same numbers to rounding.
        mask_a, mask_b, lengths_a, lengths_b: see ``sinkhorn``.
        init: see ``sinkhorn``; shaped like the masses.
        epsilon, max_iter, tol, rho, omega, anderson, anneal: see ``sinkhorn``.
        gradient, precision, backend: see ``sinkhorn``.

    Returns:
        SinkhornResult, differentiable with respect to x, y, log_a and log_b.

    Raises:
        TypeError, ValueError, BackendUnsupported, RuntimeError: see ``sinkhorn``.

    Examples:
        >>> import torch
        >>> from optical import sinkhorn_vectors
        >>> x, y = torch.eye(3), torch.eye(3)[[2, 0, 1, 1]]
        >>> ends = torch.tensor([0, 3]), torch.tensor([0, 4])
        >>> result = sinkhorn_vectors(
        ...     x, y, epsilon=0.05, cu_seqlens_a=ends[0], cu_seqlens_b=ends[1]
        ... )
        >>> result.value_linear.round(decimals=2)
        tensor([0.1700])
    """
    options = check_options(
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
    return _solve(
        inputs.of_clouds(
            Cloud(inputs.X, x, log_a, mask_a, lengths_a, cu_seqlens_a),
            Cloud(inputs.Y, y, log_b, mask_b, lengths_b, cu_seqlens_b),
            cost,
            epsilon,
            init,
            options,
        )
    )


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
    """Compute the transported distance between each student text and its teacher text.

    ``<plan, cost(student_i, teacher_j)>``, where plan is the Sinkhorn coupling of the two clouds of
    tokens, every real token weighing the same. The clouds may differ in length and order.

    Args:
        student: (batch, n, dim) token vectors, float64/32/16 or bfloat16.
        teacher: (batch, m, dim). It receives a gradient too if it requires one.
        student_mask: (batch, n) bool or 0/1 numbers, such as an attention mask; all real when None.
            Vectors of padding are never read as numbers and their gradient is exactly 0.
        teacher_mask: (batch, m), the same for the teacher.
        cost: "cosine", "sqeuclidean" or "dot"; see ``optical.sinkhorn_vectors``.
        epsilon, max_iter, tol: see ``optical.sinkhorn``.
        **options: rho, omega, anderson, anneal, gradient, precision, backend and low_memory, see
            ``optical.sinkhorn_vectors``. With the default gradient "envelope" the plan is a fixed
            target, as in OPTICAL, which is not the total derivative; "implicit" is.

    Returns:
        (batch,) float32 (float64 for float64 vectors), 0 where either text has no real token.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        BackendUnsupported: the backend asked for by name cannot serve the problem.

    Source: Huang, Yu, Allan, "Improving Cross-lingual Information Retrieval on Low-Resource
    Languages via Optimal Transport Distillation" (OPTICAL, WSDM 2023, arXiv 2301.12566).

    Examples:
        >>> import torch
        >>> from optical import ot_alignment
        >>> teacher = torch.eye(3)[None]
        >>> ot_alignment(teacher.flip(1), teacher).round(decimals=3)   # word order costs nothing
        tensor([0.])
    """
    checked = check_options(epsilon=epsilon, max_iter=max_iter, tol=tol, cost=cost, **options)
    rows = Cloud(inputs.STUDENT, student, mask=student_mask)
    columns = Cloud(inputs.TEACHER, teacher, mask=teacher_mask)
    return _solve(inputs.of_clouds(rows, columns, cost, epsilon, None, checked)).value_linear


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_b: Tensor | None = None,
    **options: Unpack[DivergenceOptions],
) -> Tensor:
    """Compute the Sinkhorn divergence of clouds of vectors, which is 0 for equal clouds.

    ``value(x, y) - value(x, x) / 2 - value(y, y) / 2 + epsilon / 2 * (sum a - sum b) ** 2``, where
    value is that of ``sinkhorn_vectors`` (GeomLoss: SamplesLoss with debias=True). At convergence
    it is >= 0 for costs such as "sqeuclidean", whose ``exp(-cost / epsilon)`` is a positive kernel.

    Args:
        x, y, log_a, log_b, epsilon: see ``sinkhorn_vectors``.
        mask_a, mask_b, lengths_a, lengths_b, cu_seqlens_a, cu_seqlens_b: see ``sinkhorn_vectors``.
        **options: cost, max_iter, tol, rho (one for both sides), omega, anderson, anneal, gradient,
            precision, backend and low_memory, see ``sinkhorn_vectors``.

    Returns:
        (batch,), differentiable with respect to x, y, log_a and log_b, and 0 where a side is
        empty.

    Raises:
        TypeError, ValueError, BackendUnsupported, RuntimeError: see ``sinkhorn``. rho may not
            differ between the sides, for no divergence is known then.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (arXiv 1810.08278); unequal masses: Séjourné, Feydy, Vialard, Trouvé, Peyré,
    "Sinkhorn Divergences for Unbalanced Optimal Transport" (arXiv 1910.12958), definition 5.

    Examples:
        >>> import torch
        >>> from optical import sinkhorn_divergence
        >>> x = torch.eye(3)[None]
        >>> sinkhorn_divergence(x, x.flip(1), epsilon=0.1, cost="sqeuclidean").abs() < 1e-6
        tensor([True])
    """
    checked = check_options(epsilon=epsilon, **options)
    if checked["rho_a"] != checked["rho_b"]:
        raise ValueError(f"rho is {options['rho']}; expected one strength for both sides")
    p = inputs.of_clouds(
        Cloud(inputs.X, x, log_a, mask_a, lengths_a, cu_seqlens_a),
        Cloud(inputs.Y, y, log_b, mask_b, lengths_b, cu_seqlens_b),
        options.get("cost", "cosine"),
        epsilon,
        None,
        checked,
    )
    within_x = p._replace(y=p.x, cu_b=p.cu_a, log_b=p.log_a)
    assert p.y is not None
    within_y = p._replace(x=p.y, cu_a=p.cu_b, log_a=p.log_b)
    excess = _totals(p.log_a, p.cu_a) - _totals(p.log_b, p.cu_b)
    result = _solve(p)
    own = (_solve(within_x).value + _solve(within_y).value) / 2
    divergence = result.value - own + p.epsilon / 2 * excess**2
    return divergence.masked_fill(result.status == int(Status.EMPTY), 0.0)


def _solve(arguments: Arguments) -> SinkhornResult:
    outputs = ops.sinkhorn(arguments)
    kept = arguments if arguments.gradient == "unroll" else detached(arguments)
    return SinkhornResult(*outputs[:7], outputs.residual, kept)


def _totals(log_mass: Tensor, offsets: Tensor | None) -> Tensor:
    """(batch,) the mass of each problem."""
    mass = log_mass.exp()
    return mass.sum(1) if offsets is None else torch.segment_reduce(mass, "sum", offsets=offsets)
