"""From the arguments of a public function to a ``Problem``.

Leading dimensions are merged into one here: a ``Problem`` has (batch, n, m).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optical.backends.dense import cost_matrix
from optical.backends.problem import Problem
from optical.ot.checks import (
    Lead,
    Options,
    check_device,
    check_floating,
    check_pair,
    check_shape,
    fold,
    last_temperature,
    values_available,
)
from optical.ot.masses import Masses, constant, in_one_launch, offsets_of


class Posed(NamedTuple):
    """A problem with what its caller knows beside it.

    Attributes:
        problem: the problem, with one batch dimension.
        lead: the leading dimensions that were merged; None if there was one, or none to merge.
        epsilon: (batch,) temperatures that require a gradient, or None.
        rho: (batch,) strengths of the penalties, by which the problem was divided, or None.
    """

    problem: Problem
    lead: Lead | None
    epsilon: Tensor | None
    rho: Tensor | None = None

    def with_penalties(self, rho: Tensor | None) -> Posed:
        """Give each problem its own strength of the penalties, which are 1 so far.

        Dividing cost, temperature and penalty of a problem by a number divides its value and its
        potentials and leaves its plan: the penalty is 1 after division by itself.
        """
        if rho is None:
            return self
        problem = self.problem
        if problem.packed or problem.anneal_start > 0:
            other = "cu_seqlens" if problem.packed else "anneal"
            raise ValueError(
                f"rho is a tensor with {other}; expected a number or a pair of numbers"
            )
        batch = problem.epsilon.shape[0]
        shape = (batch,) if self.lead is None else self.lead
        check_floating("rho", rho, str(shape), rho.dim())
        check_shape("rho", rho, shape, "one strength per problem")
        check_device("rho", rho, "the cost", problem.epsilon)
        if rho.requires_grad:
            raise ValueError("rho requires grad; it receives none, so pass rho.detach()")
        rho = rho if self.lead is None else fold(rho, self.lead)
        wrong = ~((rho > 0) & rho.isfinite())
        if values_available(rho) and bool(wrong.any()):
            found = rho[wrong][0].item()
            raise ValueError(f"rho holds {found}; expected finite strengths > 0")
        rho = torch.where(wrong, float("nan"), rho).to(problem.epsilon.dtype)
        x, y = problem.x, problem.y
        if y is not None:
            with torch.autocast(x.device.type, enabled=False):
                x = cost_matrix(x, y, problem.log_a, problem.log_b, problem.kind)
        f0, g0 = (None if v is None else v / rho[:, None] for v in (problem.f0, problem.g0))
        divided = problem._replace(
            x=x / rho[:, None, None],
            y=None,
            kind="given",
            epsilon=problem.epsilon / rho,
            f0=f0,
            g0=g0,
        )
        return self._replace(problem=divided, rho=rho)


def problem_of_cost(
    cost: Tensor,
    rows: Masses,
    columns: Masses,
    epsilon: float | Tensor,
    init: tuple[Tensor, Tensor] | None,
    options: Options,
) -> Posed:
    """Validate a cost (..., n, m) and its masses; ``options`` are those of ``check_options``."""
    check_floating("cost", cost, "(..., n, m)", 2, least=True)
    lead = None
    if cost.dim() != 3:
        lead = tuple(cost.shape[:-2])
        n, m = cost.shape[-2:]
        rows, columns = rows.fold(lead, lead, n), columns.fold(lead, lead, m)
        epsilon, init = _fold_epsilon(epsilon, lead), _fold_init(init, lead, n, m)
        cost = fold(cost, lead)
    dtype = _compute_dtype(cost.dtype)
    if cost.dtype != dtype:
        cost = cost.to(dtype)
    batch, n, m = cost.shape
    shapes = (batch, n), (batch, m)
    log_a, log_b, temperatures, learnt = _masses(
        rows, columns, cost, cost, shapes, dtype, batch, epsilon, options
    )
    f0, g0 = _initial_potentials(init, log_a, log_b)
    fields = (cost, None, "given", None, None, log_a, log_b, temperatures, f0, g0)
    return Posed(_problem(fields, options), lead, learnt)


def problem_of_vectors(
    x: Tensor,
    y: Tensor,
    rows: Masses,
    columns: Masses,
    kind: str,
    epsilon: float | Tensor,
    init: tuple[Tensor, Tensor] | None,
    options: Options,
    broadcast: bool = False,
) -> Posed:
    """Validate vectors and their masses; ``options`` are those of ``check_options``.

    ``broadcast``: the leading dimensions of x and y may differ as broadcasting allows.
    """
    packed = rows.offsets is not None or columns.offsets is not None
    lead = _check_vectors(x, y, rows, columns, packed, broadcast)
    if lead is not None:
        n, m = x.shape[-2], y.shape[-2]
        rows = rows.fold(tuple(x.shape[:-2]), lead, n)
        columns = columns.fold(tuple(y.shape[:-2]), lead, m)
        epsilon, init = _fold_epsilon(epsilon, lead), _fold_init(init, lead, n, m)
        x, y = (fold(v.expand((*lead, *v.shape[-2:])), lead) for v in (x, y))
    dtype = _compute_dtype(x.dtype, y.dtype)
    cu_a, cu_b = offsets_of(rows, x), offsets_of(columns, y)
    batch = x.shape[0]
    if cu_a is not None and cu_b is not None:
        batch = cu_a.shape[0] - 1
        check_shape(columns.names.offsets, cu_b, (batch + 1,), f"as {rows.names.offsets}")
    shapes = tuple(x.shape[:-1]), tuple(y.shape[:-1])
    log_a, log_b, temperatures, learnt = _masses(
        rows, columns, x, y, shapes, dtype, batch, epsilon, options
    )
    if dtype == torch.float64:
        x, y = x.to(dtype), y.to(dtype)
    f0, g0 = _initial_potentials(init, log_a, log_b)
    fields: tuple[Any, ...] = (x, y, kind, cu_a, cu_b, log_a, log_b, temperatures, f0, g0)
    if kind == "euclidean":
        fields = (_distances(x, y, log_a, log_b, packed, options), None, "given", *fields[3:])
    return Posed(_problem(fields, options), lead, learnt)


def _problem(fields: tuple[Any, ...], options: tuple[Any, ...]) -> Problem:
    return Problem(*fields, *options)


def _fold_epsilon(epsilon: float | Tensor, lead: Lead) -> float | Tensor:
    if not isinstance(epsilon, Tensor) or epsilon.dim() == 0:
        return epsilon
    check_shape("epsilon", epsilon, lead, "one temperature per problem")
    return fold(epsilon, lead)


def _fold_init(init: Any, lead: Lead, n: int, m: int) -> Any:
    if init is None:
        return None
    potentials = []
    for i, (value, size) in enumerate(zip(check_pair("init", init, "(f, g)"), (n, m), strict=True)):
        check_floating(f"init[{i}]", value, str((*lead, size)), len(lead) + 1)
        check_shape(f"init[{i}]", value, (*lead, size), "one potential per mass")
        potentials.append(fold(value, lead))
    return tuple(potentials)


def _check_vectors(
    x: Tensor, y: Tensor, rows: Masses, columns: Masses, packed: bool, broadcast: bool
) -> Lead | None:
    """Check the shapes of both sides; return the leading dimensions if they have to be folded."""
    for side, vectors in ((rows, x), (columns, y)):
        names = side.names
        if packed and side.offsets is None:
            raise ValueError(f"{names.offsets} is None; expected one for each side, or none")
        layout = f"({names.size.upper()}, dim)" if packed else f"(..., {names.size}, dim)"
        check_floating(names.source, vectors, layout, 2, least=not packed)
    x_name, y_name = rows.names.source, columns.names.source
    check_device(y_name, y, x_name, x)
    if x.shape[-1] < 1:
        raise ValueError(f"{x_name} has shape {tuple(x.shape)}; expected dim >= 1")
    if x.shape[-1] != y.shape[-1]:
        size = "M" if packed else ", ".join(map(str, (*x.shape[:-2], "m")))
        expected = f"({size}, dim={x.shape[-1]}) as in {x_name}"
        raise ValueError(f"{y_name} has shape {tuple(y.shape)}; expected {expected}")
    if packed or (x.dim() == y.dim() == 3 and x.shape[0] == y.shape[0]):
        return None
    own, other = tuple(x.shape[:-2]), tuple(y.shape[:-2])
    if own == other:
        return own
    if broadcast:
        try:
            return tuple(torch.broadcast_shapes(own, other))  # type: ignore[no-untyped-call]
        except RuntimeError:
            pass
    lead = f"batch={own[0]}" if len(own) == 1 else ", ".join(map(str, own))
    expected = f"({lead}{', ' if own else ''}m, dim={x.shape[-1]}) as in {x_name}"
    raise ValueError(f"{y_name} has shape {tuple(y.shape)}; expected {expected}")


def _masses(
    rows: Masses,
    columns: Masses,
    x: Tensor,
    y: Tensor,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    batch: int,
    epsilon: float | Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the log-masses of both sides, the temperatures, and those that require a gradient."""
    if not x.is_cpu or options.backend == "triton":
        sizes = batch, shapes[0][-1], shapes[1][-1]
        made = in_one_launch(rows, columns, x, sizes, dtype, epsilon, options.backend)
        if made is not None:
            return *made, None
    balanced = options.rho_a == options.rho_b == float("inf")
    log_a = rows.log_masses(x, shapes[0], dtype, balanced, options.backend)
    log_b = columns.log_masses(y, shapes[1], dtype, balanced, options.backend)
    return log_a, log_b, *_temperatures(epsilon, batch, log_a, rows.names.source, options)


def _compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _distances(
    x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor, packed: bool, options: Options
) -> Tensor:
    """(batch, n, m) Euclidean distances; 0 between padding, whose vectors are never used."""
    for wrong, name in ((packed, "cu_seqlens"), (options.low_memory, "low_memory")):
        if wrong:
            raise ValueError(f"cost is 'euclidean' with {name}; expected padded problems without")
    x, y = (
        torch.where((log_mass != -float("inf"))[:, :, None], vectors, 0.0).to(log_mass.dtype)
        for vectors, log_mass in ((x, log_a), (y, log_b))
    )
    # Differences, not products: near 0, the square root would magnify what cancels.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _temperatures(
    epsilon: float | Tensor, batch: int, like: Tensor, name: str, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return (batch,) temperatures in the dtype and on the device of ``like``, without gradient.

    Also returns them with their gradient, or None if they have none. ``name`` is the argument
    whose device ``like`` shares.
    """
    if not isinstance(epsilon, Tensor):
        return constant(like, (batch,), float(epsilon), like.dtype), None
    check_floating("epsilon", epsilon, f"({batch},)", epsilon.dim())
    if epsilon.dim() == 0:
        epsilon = epsilon.expand(batch)
    if tuple(epsilon.shape) != (batch,):
        found = tuple(epsilon.shape)
        raise ValueError(f"epsilon has shape {found}; expected a float or shape ({batch},)")
    check_device("epsilon", epsilon, name, like)
    epsilon = epsilon.to(like.dtype)
    temperatures = epsilon.detach()
    if options.anneal_start > 0 and options.max_iter > 0:
        temperatures = _reached(temperatures, options)
    if not epsilon.requires_grad:
        return temperatures, None
    if options.gradient == "unroll":
        raise ValueError(
            "epsilon requires grad, which gradient='unroll' does not give; expected 'envelope' or "
            "'implicit', or epsilon.detach()"
        )
    return temperatures, epsilon


def _reached(epsilon: Tensor, options: Options) -> Tensor:
    """Refuse temperatures that annealing does not reach.

    Where the values are not at hand they become NaN, so that the problem is INFEASIBLE.
    """
    last = last_temperature(options)
    # Temperatures that are not positive are reported by the status.
    missed = (epsilon > 0) & (epsilon < last)
    if not values_available(epsilon):
        return torch.where(missed, float("nan"), epsilon)
    if bool(missed.any()):
        lowest = epsilon[missed].min().item()
        raise ValueError(
            f"anneal is {(options.anneal_start, options.anneal_ratio)}, whose temperature is still "
            f"{last:.3g} at the last of {options.max_iter} iterations; expected at most "
            f"{lowest:.3g}, the smallest epsilon"
        )
    return epsilon


def _initial_potentials(
    init: Any, log_a: Tensor, log_b: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return f0 and g0 in the dtype of the log-masses, detached from the graph."""
    if init is None:
        return None, None
    potentials = []
    pair = check_pair("init", init, "(f, g)")
    for name, value, like in (("init[0]", pair[0], log_a), ("init[1]", pair[1], log_b)):
        check_floating(name, value, f"{tuple(like.shape)}", like.dim())
        check_shape(name, value, tuple(like.shape), "one potential per mass")
        check_device(name, value, "the cost", like)
        potentials.append(value.detach().to(like.dtype))
    return potentials[0], potentials[1]
