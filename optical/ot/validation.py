"""Argument validation: from the arguments of a public function to a ``Problem``.

Error messages name the argument, its value and the expected value. Checks never synchronise with
the device: values are inspected only for concrete CPU tensors outside tracing.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optical.backends.problem import BACKEND_NAMES, GRADIENTS, KINDS, PRECISIONS, Problem

MAX_MEMORY = 16  # of Anderson acceleration


class SideNames(NamedTuple):
    """Names of the arguments of one side (rows or columns), as its caller wrote them.

    Attributes:
        source: the argument whose shape the masses follow, such as "cost" or "x".
        size: the letter of the side's size in shapes, "n" or "m".
        log_mass, mask, lengths, offsets: the other arguments.
    """

    source: str
    size: str
    log_mass: str
    mask: str
    lengths: str
    offsets: str


COST_ROWS = SideNames("cost", "n", "log_a", "mask_a", "lengths_a", "")
COST_COLUMNS = SideNames("cost", "m", "log_b", "mask_b", "lengths_b", "")
X = COST_ROWS._replace(source="x", offsets="cu_seqlens_a")
Y = COST_COLUMNS._replace(source="y", offsets="cu_seqlens_b")
STUDENT = X._replace(source="student", mask="student_mask")
TEACHER = Y._replace(source="teacher", mask="teacher_mask")


class Masses(NamedTuple):
    """The arguments that determine the log-masses of one side, as given by the user.

    Attributes:
        names: names of these arguments, for error messages.
        log_mass: (batch, n) or packed (N,).
        mask: (batch, n), bool or 0/1 numbers.
        lengths: (batch,) integers.
        offsets: (batch + 1,) integers, for packed problems.
    """

    names: SideNames
    log_mass: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None
    offsets: Tensor | None = None


def problem_of_cost(
    cost: Tensor,
    rows: Masses,
    columns: Masses,
    epsilon: float | Tensor,
    init: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
) -> Problem:
    """Validate a cost (batch, n, m) and its masses; ``options`` are those of ``check_options``."""
    check_floating("cost", cost, "(batch, n, m)", 3)
    cost = cost.to(_compute_dtype(cost.dtype))
    batch, n, m = cost.shape
    log_a = _log_masses(rows, cost, (batch, n), cost.dtype)
    log_b = _log_masses(columns, cost, (batch, m), cost.dtype)
    temperatures = _temperatures(epsilon, batch, log_a, "cost")
    f0, g0 = _initial_potentials(init, log_a, log_b)
    return Problem(cost, None, "given", None, None, log_a, log_b, temperatures, f0, g0, **options)


def problem_of_vectors(
    x: Tensor,
    y: Tensor,
    rows: Masses,
    columns: Masses,
    kind: str,
    epsilon: float | Tensor,
    init: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
) -> Problem:
    """Validate vectors and their masses; ``options`` are those of ``check_options``."""
    _check_vectors(x, y, rows, columns)
    dtype = _compute_dtype(torch.promote_types(x.dtype, y.dtype))
    cu_a, cu_b = _offsets(rows, x), _offsets(columns, y)
    batch = x.shape[0]
    if cu_a is not None and cu_b is not None:
        batch = cu_a.shape[0] - 1
        check_shape(columns.names.offsets, cu_b, (batch + 1,), f"as {rows.names.offsets}")
    log_a = _log_masses(rows, x, x.shape[:-1], dtype)
    log_b = _log_masses(columns, y, y.shape[:-1], dtype)
    if dtype == torch.float64:
        x, y = x.to(dtype), y.to(dtype)
    temperatures = _temperatures(epsilon, batch, log_a, rows.names.source)
    f0, g0 = _initial_potentials(init, log_a, log_b)
    return Problem(x, y, kind, cu_a, cu_b, log_a, log_b, temperatures, f0, g0, **options)


# ---------------------------------------------------------------------------------------- options


def check_options(
    *,
    epsilon: float | Tensor,
    max_iter: int = 100,
    tol: float = 0.0,
    rho: float | tuple[float | None, float | None] | None = None,
    omega: float = 1.0,
    anderson: int = 0,
    anneal: tuple[float, float] | None = None,
    gradient: str = "envelope",
    backend: str = "auto",
    low_memory: bool = False,
    precision: str = "exact",
    cost: str = "cosine",
) -> dict[str, Any]:
    """Validate the options that can be checked without tensors.

    Returns:
        The options as fields of ``optical.backends.Problem``; epsilon and cost are left out.

    Raises:
        TypeError, ValueError: an option has a wrong type or value.
    """
    if not isinstance(epsilon, Tensor):
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
            found = type(epsilon).__name__
            raise TypeError(f"epsilon is a {found}; expected a float or a tensor (batch,)")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}; expected a finite number > 0")
    _check_integer("max_iter", max_iter, 0, None)
    _check_number("tol", tol)
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol is {tol}; expected a finite number >= 0")
    rho_a, rho_b = _penalties(rho)
    _check_number("omega", omega)
    if not 0 < omega < 2:
        raise ValueError(f"omega is {omega}; expected a number between 0 and 2")
    _check_integer("anderson", anderson, 0, MAX_MEMORY)
    anneal_start, anneal_ratio = _annealing(anneal)
    _check_choice("gradient", gradient, GRADIENTS)
    if anderson and omega != 1:
        raise ValueError(f"omega is {omega}; expected 1.0 with anderson > 0, which replaces it")
    if anderson and gradient == "unroll":
        raise ValueError(
            "gradient='unroll' cannot differentiate Anderson acceleration; "
            "use 'implicit' or 'envelope'"
        )
    if not isinstance(low_memory, bool):
        raise TypeError(f"low_memory is a {type(low_memory).__name__}; expected a bool")
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("cost", cost, KINDS[1:])
    if not isinstance(backend, str):
        raise TypeError(f"backend is a {type(backend).__name__}; expected a str")
    _check_choice("backend", backend, BACKEND_NAMES)
    return {
        "max_iter": max_iter,
        "tol": float(tol),
        "rho_a": rho_a,
        "rho_b": rho_b,
        "omega": float(omega),
        "anderson": anderson,
        "anneal_start": anneal_start,
        "anneal_ratio": anneal_ratio,
        "gradient": gradient,
        "low_memory": low_memory,
        "precision": precision,
        "backend": backend,
    }


def _penalties(rho: Any) -> tuple[float, float]:
    """Return rho_a and rho_b, inf for a fixed marginal."""
    pair = (rho, rho)
    if isinstance(rho, (tuple, list)):
        pair = _pair("rho", rho, "(rho_a, rho_b)")
    strengths = []
    for strength in pair:
        if strength is None:
            strength = math.inf
        if isinstance(strength, bool) or not isinstance(strength, (int, float)):
            expected = "None, a number > 0, or a pair of these"
            raise TypeError(f"rho holds a {type(strength).__name__}; expected {expected}")
        if not strength > 0:
            raise ValueError(f"rho is {rho}; expected numbers > 0 (None or inf: a fixed marginal)")
        strengths.append(float(strength))
    return strengths[0], strengths[1]


def _annealing(anneal: Any) -> tuple[float, float]:
    """Return the start and ratio of annealing; a start of 0 disables it."""
    if anneal is None:
        return 0.0, 0.5
    start, ratio = _pair("anneal", anneal, "(start, ratio)")
    _check_number("anneal", start)
    _check_number("anneal", ratio)
    if not (0 < start < math.inf and 0 < ratio < 1):
        expected = "a finite start > 0 and a ratio between 0 and 1"
        raise ValueError(f"anneal is {(start, ratio)}; expected {expected}")
    return float(start), float(ratio)


def _pair(name: str, value: Any, layout: str) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a pair {layout}")
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} entries; expected a pair {layout}")
    return value[0], value[1]


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a float")


def _check_integer(name: str, value: Any, least: int, most: int | None) -> None:
    expected = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} is {value}; expected {expected}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}; expected one of {expected}")


# ---------------------------------------------------------------------------------------- tensors


def check_floating(name: str, value: Any, layout: str, dim: int) -> None:
    """Raise unless ``value`` is a floating-point tensor of ``dim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor {layout}")
    if value.dim() != dim:
        hint = "; add the batch dimension with unsqueeze(0)" if value.dim() == dim - 1 else ""
        hint = hint if layout.startswith("(batch") else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {layout}{hint}")
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        expected = "float64, float32, float16 or bfloat16"
        raise TypeError(f"{name} has dtype {value.dtype}; expected {expected}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on the same device."""
    if value.device != other.device:
        expected = f"{other.device}, where {other_name} is"
        raise ValueError(f"{name} is on {value.device}; expected {expected}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], reason: str) -> None:
    """Raise unless the tensor has exactly this shape; ``reason`` ends the message."""
    if tuple(value.shape) != tuple(shape):
        found, expected = tuple(value.shape), tuple(shape)
        raise ValueError(f"{name} has shape {found}; expected {expected}, {reason}")


def _check_integers(name: str, value: Any, layout: str) -> None:
    if not isinstance(value, Tensor):
        found = type(value).__name__
        raise TypeError(f"{name} is a {found}; expected an integer tensor {layout}")
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} has dtype {value.dtype}; expected int64 or int32")


def _check_vectors(x: Tensor, y: Tensor, rows: Masses, columns: Masses) -> None:
    packed = rows.offsets is not None or columns.offsets is not None
    for side, vectors in ((rows, x), (columns, y)):
        names = side.names
        if packed and side.offsets is None:
            raise ValueError(f"{names.offsets} is None; expected one for each side, or none")
        layout = f"({names.size.upper()}, dim)" if packed else f"(batch, {names.size}, dim)"
        check_floating(names.source, vectors, layout, 2 if packed else 3)
    x_name, y_name = rows.names.source, columns.names.source
    check_device(y_name, y, x_name, x)
    if x.shape[-1] < 1:
        raise ValueError(f"{x_name} has shape {tuple(x.shape)}; expected dim >= 1")
    if x.shape[-1] != y.shape[-1] or (not packed and x.shape[0] != y.shape[0]):
        size = "M" if packed else f"batch={x.shape[0]}, m"
        expected = f"({size}, dim={x.shape[-1]}) as in {x_name}"
        raise ValueError(f"{y_name} has shape {tuple(y.shape)}; expected {expected}")


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _values_available(tensor: Tensor) -> bool:
    """Whether the values can be read without a device sync and outside tracing."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # A fake tensor is of another type; under vmap, one tensor represents many.
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _temperatures(epsilon: float | Tensor, batch: int, like: Tensor, name: str) -> Tensor:
    """Return (batch,) temperatures in the dtype and on the device of ``like``.

    ``name`` is the argument whose device ``like`` shares.
    """
    if not isinstance(epsilon, Tensor):
        return like.new_full((batch,), float(epsilon))
    check_floating("epsilon", epsilon, f"({batch},)", epsilon.dim())
    if tuple(epsilon.shape) != (batch,):
        found = tuple(epsilon.shape)
        raise ValueError(f"epsilon has shape {found}; expected a float or shape ({batch},)")
    check_device("epsilon", epsilon, name, like)
    if epsilon.requires_grad:
        raise ValueError("epsilon requires grad; it receives none, so pass epsilon.detach()")
    return epsilon.to(like.dtype)


def _initial_potentials(
    init: Any, log_a: Tensor, log_b: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return f0 and g0 in the dtype of the log-masses, detached from the graph."""
    if init is None:
        return None, None
    potentials = []
    pair = _pair("init", init, "(f, g)")
    for name, value, like in (("init[0]", pair[0], log_a), ("init[1]", pair[1], log_b)):
        check_floating(name, value, f"{tuple(like.shape)}", like.dim())
        check_shape(name, value, tuple(like.shape), "one potential per mass")
        check_device(name, value, "the cost", like)
        potentials.append(value.detach().to(like.dtype))
    return potentials[0], potentials[1]


# ----------------------------------------------------------------------------------------- masses


def _log_masses(side: Masses, source: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the log-masses of one side, (batch, n) or packed (N,), -inf for padding.

    Masses given by the user are kept where a mask or a length leaves them. Otherwise the valid
    rows (or columns) of a problem weigh the same and 1 together.
    """
    names, log_mass, mask, lengths, offsets = side
    for name, value in ((names.mask, mask), (names.lengths, lengths)):
        if value is not None and offsets is not None:
            raise ValueError(f"{name} is given together with {names.offsets}; expected one of them")
    if mask is not None and lengths is not None:
        raise ValueError(
            f"{names.lengths} is given together with {names.mask}; expected one of them"
        )
    valid = None
    if mask is not None:
        valid = _valid_by_mask(names, mask, source, shape)
    elif lengths is not None:
        valid = _valid_by_length(names, lengths, source, shape)
    if log_mass is None:
        return _uniform(source, shape, dtype, valid, offsets)
    layout = f"(batch, {names.size})" if offsets is None else f"({names.size.upper()},)"
    check_floating(names.log_mass, log_mass, layout, len(shape))
    check_shape(names.log_mass, log_mass, shape, f"{layout} of {names.source}")
    check_device(names.log_mass, log_mass, names.source, source)
    log_mass = log_mass.to(dtype)
    return log_mass if valid is None else torch.where(valid, log_mass, -math.inf)


def _uniform(
    source: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    valid: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    if offsets is not None:
        position = torch.arange(shape[0], device=source.device)
        problem = torch.searchsorted(offsets[1:], position, right=True)
        # Offsets on a device are not checked; vectors beyond the last one belong to the last
        # problem.
        problem = problem.clamp(max=offsets.shape[0] - 2)
        return -offsets.diff().to(dtype).log()[problem]
    if valid is None:
        return source.new_full(shape, -math.log(max(shape[1], 1)), dtype=dtype)
    count = valid.sum(1, keepdim=True).clamp(min=1).to(dtype)
    return torch.where(valid, -count.log(), -math.inf)


def _valid_by_mask(
    names: SideNames, mask: Tensor, source: Tensor, shape: tuple[int, ...]
) -> Tensor:
    if not isinstance(mask, Tensor):
        found = type(mask).__name__
        raise TypeError(f"{names.mask} is a {found}; expected a bool tensor {tuple(shape)}")
    check_shape(names.mask, mask, shape, f"(batch, {names.size}) of {names.source}")
    check_device(names.mask, mask, names.source, source)
    if mask.is_complex():
        expected = "bool, or 0/1 integers or floats"
        raise TypeError(f"{names.mask} has dtype {mask.dtype}; expected {expected}")
    return mask if mask.dtype == torch.bool else mask != 0


def _valid_by_length(
    names: SideNames, lengths: Tensor, source: Tensor, shape: tuple[int, ...]
) -> Tensor:
    name = names.lengths
    _check_integers(name, lengths, f"({shape[0]},)")
    check_shape(name, lengths, shape[:1], f"(batch,) of {names.source}")
    check_device(name, lengths, names.source, source)
    if _values_available(lengths):
        for i, length in enumerate(lengths.tolist()):
            if not 0 <= length <= shape[1]:
                raise ValueError(f"{name} is {length} at {i}; expected 0 to {shape[1]}")
    return torch.arange(shape[1], device=source.device) < lengths[:, None]


# ---------------------------------------------------------------------------------------- offsets


def _offsets(side: Masses, vectors: Tensor) -> Tensor | None:
    """Return (batch + 1,) int64: the offset of each packed problem, and their total length."""
    name, offsets = side.names.offsets, side.offsets
    if offsets is None:
        return None
    _check_integers(name, offsets, "(batch + 1,)")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(offsets.shape)}; expected (batch + 1,)")
    check_device(name, offsets, side.names.source, vectors)
    if _values_available(offsets):
        values = offsets.tolist()
        if values[0] != 0:
            raise ValueError(f"{name} begins with {values[0]}; expected 0")
        for i, (before, after) in enumerate(itertools.pairwise(values)):
            if after < before:
                raise ValueError(f"{name} falls from {before} to {after} at {i + 1}; it must not")
        if values[-1] != vectors.shape[0]:
            expected = f"{vectors.shape[0]}, the length of {side.names.source}"
            raise ValueError(f"{name} ends with {values[-1]}; expected {expected}")
    return offsets.to(torch.int64)
