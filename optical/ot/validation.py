"""From what a user gives to the bundle that the operator takes: dtypes, masses, masks, offsets."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optical.backends import registry
from optical.backends.problem import GRADIENTS, KINDS, PRECISIONS, Problem


class Side(NamedTuple):
    """The names of the arguments of one side of a problem, as its caller wrote them."""

    tokens: str
    log_mass: str
    mask: str
    lengths: str
    offsets: str
    size: str


ROWS = Side("cost", "log_a", "mask_a", "lengths_a", "", "n")
COLUMNS = Side("cost", "log_b", "mask_b", "lengths_b", "", "m")
X = Side("x", "log_a", "mask_a", "lengths_a", "cu_seqlens_a", "n")
Y = Side("y", "log_b", "mask_b", "lengths_b", "cu_seqlens_b", "m")
STUDENT = X._replace(tokens="student", mask="student_mask")
TEACHER = Y._replace(tokens="teacher", mask="teacher_mask")


class Cloud(NamedTuple):
    """The arguments of one side, as the user gave them."""

    side: Side
    tokens: Tensor
    log_mass: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None
    offsets: Tensor | None = None


def of_cost(
    rows: Cloud,
    columns: Cloud,
    epsilon: float | Tensor,
    init: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
) -> Problem:
    """Check and bundle a given cost, which both sides hold as their tokens."""
    cost = rows.tokens
    check_floating("cost", cost, "(batch, n, m)", 3)
    cost = cost.to(_compute_dtype(cost.dtype))
    batch, n, m = cost.shape
    log_a = _log_masses(rows, (batch, n), cost.dtype)
    log_b = _log_masses(columns, (batch, m), cost.dtype)
    temperatures = _temperatures(epsilon, batch, log_a, "cost")
    f0, g0 = _start(init, log_a, log_b)
    return Problem(cost, None, "given", None, None, log_a, log_b, temperatures, f0, g0, **options)


def of_clouds(
    rows: Cloud,
    columns: Cloud,
    kind: str,
    epsilon: float | Tensor,
    init: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
) -> Problem:
    """Check two clouds of vectors and bundle them."""
    packed = rows.offsets is not None or columns.offsets is not None
    for cloud in (rows, columns):
        name, length = cloud.side.tokens, cloud.side.size
        if packed and cloud.offsets is None:
            raise ValueError(f"{cloud.side.offsets} is None; expected one for each side, or none")
        layout = f"({length.upper()}, dim)" if packed else f"(batch, {length}, dim)"
        check_floating(name, cloud.tokens, layout, 2 if packed else 3)
    x, y = rows.tokens, columns.tokens
    names = rows.side.tokens, columns.side.tokens
    check_device(names[1], y, names[0], x)
    if x.shape[-1] < 1:
        raise ValueError(f"{names[0]} has shape {tuple(x.shape)}; expected dim >= 1")
    if x.shape[-1] != y.shape[-1] or (not packed and x.shape[0] != y.shape[0]):
        size = "M" if packed else f"batch={x.shape[0]}, m"
        wanted = f"({size}, dim={x.shape[-1]}) as in {names[0]}"
        raise ValueError(f"{names[1]} has shape {tuple(y.shape)}; expected {wanted}")
    dtype = _compute_dtype(torch.promote_types(x.dtype, y.dtype))
    cu_a, cu_b = _offsets(rows), _offsets(columns)
    batch = x.shape[0]
    if cu_a is not None and cu_b is not None:
        batch = cu_a.shape[0] - 1
        wanted = f"as {rows.side.offsets}"
        check_shape(columns.side.offsets, cu_b, (batch + 1,), wanted)
    log_a, log_b = _log_masses(rows, x.shape[:-1], dtype), _log_masses(columns, y.shape[:-1], dtype)
    if dtype == torch.float64:
        x, y = x.to(dtype), y.to(dtype)
    temperatures = _temperatures(epsilon, batch, log_a, names[0])
    f0, g0 = _start(init, log_a, log_b)
    return Problem(x, y, kind, cu_a, cu_b, log_a, log_b, temperatures, f0, g0, **options)


def _temperatures(value: float | Tensor, batch: int, like: Tensor, name: str) -> Tensor:
    """(batch,) temperatures in the dtype and on the device of ``like``, the argument ``name``."""
    if not isinstance(value, Tensor):
        return like.new_full((batch,), float(value))
    check_floating("epsilon", value, f"({batch},)", value.dim())
    if tuple(value.shape) != (batch,):
        found = tuple(value.shape)
        raise ValueError(f"epsilon has shape {found}; expected a float or shape ({batch},)")
    check_device("epsilon", value, name, like)
    if value.requires_grad:
        raise ValueError("epsilon requires grad; it receives none, so pass epsilon.detach()")
    return value.to(like.dtype)


def _log_masses(cloud: Cloud, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The log-masses of one side, of ``shape`` (batch, n) or packed (N,): -inf where absent.

    Given ones keep their values where a mask or a length leaves them; without, every present token
    of a problem weighs the same.
    """
    side, tokens, log_mass, mask, lengths, offsets = cloud
    for name, value in ((side.mask, mask), (side.lengths, lengths)):
        if value is not None and offsets is not None:
            raise ValueError(f"{name} is given together with {side.offsets}; expected one of them")
    if mask is not None and lengths is not None:
        raise ValueError(f"{side.lengths} is given together with {side.mask}; expected one of them")
    present = None
    if mask is not None:
        present = _present(side, mask, tokens, shape)
    elif lengths is not None:
        present = _within(side, lengths, tokens, shape)
    if log_mass is None:
        return _uniform(tokens, shape, dtype, present, offsets)
    layout = f"(batch, {side.size})" if offsets is None else f"({side.size.upper()},)"
    check_floating(side.log_mass, log_mass, layout, len(shape))
    check_shape(side.log_mass, log_mass, shape, f"{layout} of {side.tokens}")
    check_device(side.log_mass, log_mass, side.tokens, tokens)
    log_mass = log_mass.to(dtype)
    return log_mass if present is None else torch.where(present, log_mass, -math.inf)


def _uniform(
    tokens: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    present: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    if offsets is not None:
        place = torch.arange(shape[0], device=tokens.device)
        problem = torch.searchsorted(offsets[1:], place, right=True)
        # Offsets on a device are not checked: a token behind the last one belongs to the last.
        problem = problem.clamp(max=offsets.shape[0] - 2)
        return -offsets.diff().to(dtype).log()[problem]
    if present is None:
        return tokens.new_full(shape, -math.log(max(shape[1], 1)), dtype=dtype)
    count = present.sum(1, keepdim=True).clamp(min=1).to(dtype)
    return torch.where(present, -count.log(), -math.inf)


def _present(side: Side, mask: Tensor, tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor):
        found = type(mask).__name__
        raise TypeError(f"{side.mask} is a {found}; expected a bool tensor {tuple(shape)}")
    check_shape(side.mask, mask, shape, f"(batch, {side.size}) of {side.tokens}")
    check_device(side.mask, mask, side.tokens, tokens)
    if mask.is_complex():
        wanted = "bool, or 0/1 integers or floats"
        raise TypeError(f"{side.mask} has dtype {mask.dtype}; expected {wanted}")
    return mask if mask.dtype == torch.bool else mask != 0


def _within(side: Side, lengths: Tensor, tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    name = side.lengths
    check_integers(name, lengths, f"({shape[0]},)")
    check_shape(name, lengths, shape[:1], f"(batch,) of {side.tokens}")
    check_device(name, lengths, side.tokens, tokens)
    if readable(lengths):
        for i, length in enumerate(lengths.tolist()):
            if not 0 <= length <= shape[1]:
                raise ValueError(f"{name} is {length} at {i}; expected 0 to {shape[1]}")
    return torch.arange(shape[1], device=tokens.device) < lengths[:, None]


def _offsets(cloud: Cloud) -> Tensor | None:
    """(batch + 1,) int64: where each problem of packed tokens begins, and the end."""
    name, tokens, offsets = cloud.side.offsets, cloud.tokens, cloud.offsets
    if offsets is None:
        return None
    check_integers(name, offsets, "(batch + 1,)")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(offsets.shape)}; expected (batch + 1,)")
    check_device(name, offsets, cloud.side.tokens, tokens)
    if readable(offsets):
        found = offsets.tolist()
        if found[0] != 0:
            raise ValueError(f"{name} begins with {found[0]}; expected 0")
        for i, (before, after) in enumerate(itertools.pairwise(found)):
            if after < before:
                raise ValueError(f"{name} falls from {before} to {after} at {i + 1}; it must not")
        if found[-1] != tokens.shape[0]:
            wanted = f"{tokens.shape[0]}, the length of {cloud.side.tokens}"
            raise ValueError(f"{name} ends with {found[-1]}; expected {wanted}")
    return offsets.to(torch.int64)


def _start(init: Any, log_a: Tensor, log_b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """f0 and g0 in the shapes and the dtype of the log-masses, without a gradient."""
    if init is None:
        return None, None
    found = []
    pair = check_pair("init", init, "(f, g)")
    for name, value, like in (("init[0]", pair[0], log_a), ("init[1]", pair[1], log_b)):
        check_floating(name, value, f"{tuple(like.shape)}", like.dim())
        check_shape(name, value, tuple(like.shape), "one potential per mass")
        check_device(name, value, "the cost", like)
        found.append(value.detach().to(like.dtype))
    return found[0], found[1]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


MAX_MEMORY = 16


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
    """Raise TypeError or ValueError for an option that no tensor is needed to judge.

    Returns the options as fields of ``optical.backends.problem.Problem``.
    """
    if not isinstance(epsilon, Tensor):
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
            found = type(epsilon).__name__
            raise TypeError(f"epsilon is a {found}; expected a float or a tensor (batch,)")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}; expected a finite number > 0")
    _integer("max_iter", max_iter, 0, None)
    _number("tol", tol)
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol is {tol}; expected a finite number >= 0")
    rho_a, rho_b = _penalties(rho)
    _number("omega", omega)
    if not 0 < omega < 2:
        raise ValueError(f"omega is {omega}; expected a number between 0 and 2")
    _integer("anderson", anderson, 0, MAX_MEMORY)
    start, ratio = (
        check_pair("anneal", anneal, "(start, ratio)") if anneal is not None else (0.0, 0.5)
    )
    if anneal is not None and not (0 < start < math.inf and 0 < ratio < 1):
        wanted = "a finite start > 0 and a ratio between 0 and 1"
        raise ValueError(f"anneal is {(start, ratio)}; expected {wanted}")
    _one_of("gradient", gradient, GRADIENTS)
    if anderson and omega != 1:
        raise ValueError(f"omega is {omega}; expected 1.0 with anderson > 0, which replaces it")
    if anderson and gradient == "unroll":
        raise ValueError(
            "gradient='unroll' cannot differentiate Anderson acceleration; "
            "use 'implicit' or 'envelope'"
        )
    if not isinstance(low_memory, bool):
        raise TypeError(f"low_memory is a {type(low_memory).__name__}; expected a bool")
    _one_of("precision", precision, PRECISIONS)
    _one_of("cost", cost, KINDS[1:])
    registry.check_name(backend)
    return {
        "max_iter": max_iter,
        "tol": float(tol),
        "rho_a": rho_a,
        "rho_b": rho_b,
        "omega": float(omega),
        "anderson": anderson,
        "anneal_start": float(start),
        "anneal_ratio": float(ratio),
        "gradient": gradient,
        "low_memory": low_memory,
        "precision": precision,
        "backend": backend,
    }


def _penalties(rho: Any) -> tuple[float, float]:
    pair = (
        check_pair("rho", rho, "(rho_a, rho_b)") if isinstance(rho, (tuple, list)) else (rho, rho)
    )
    found = []
    for strength in pair:
        if strength is None:
            strength = math.inf
        if isinstance(strength, bool) or not isinstance(strength, (int, float)):
            wanted = "None, a number > 0, or a pair of these"
            raise TypeError(f"rho holds a {type(strength).__name__}; expected {wanted}")
        if not strength > 0:
            raise ValueError(f"rho is {rho}; expected numbers > 0 (None or inf: a fixed marginal)")
        found.append(float(strength))
    return found[0], found[1]


def check_pair(name: str, value: Any, layout: str) -> tuple[Any, Any]:
    """The two entries of a tuple or a list."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a pair {layout}")
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} entries; expected a pair {layout}")
    if name == "anneal":
        for entry in value:
            _number(name, entry)
    return value[0], value[1]


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a float")


def _integer(name: str, value: Any, least: int, most: int | None) -> None:
    wanted = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {wanted}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} is {value}; expected {wanted}")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        wanted = ", ".join(repr(one) for one in known)
        raise ValueError(f"{name} is {value!r}; expected one of {wanted}")


# ---------------------------------------------------------------------------------------- tensors


def check_floating(name: str, value: Any, layout: str, dim: int) -> None:
    """Raise unless ``value`` is a floating tensor of ``dim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor {layout}")
    if value.dim() != dim:
        hint = "; add the batch dimension with unsqueeze(0)" if value.dim() == dim - 1 else ""
        hint = hint if layout.startswith("(batch") else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {layout}{hint}")
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        wanted = "float64, float32, float16 or bfloat16"
        raise TypeError(f"{name} has dtype {value.dtype}; expected {wanted}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if value.device != other.device:
        wanted = f"{other.device}, where {other_name} is"
        raise ValueError(f"{name} is on {value.device}; expected {wanted}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise unless the tensor has exactly this shape."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {tuple(shape)}, {why}")


def check_integers(name: str, value: Any, layout: str) -> None:
    """Raise unless ``value`` is a tensor of integers."""
    if not isinstance(value, Tensor):
        found = type(value).__name__
        raise TypeError(f"{name} is a {found}; expected an integer tensor {layout}")
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} has dtype {value.dtype}; expected int64 or int32")


def readable(tensor: Tensor) -> bool:
    """Whether looking at the values waits for nothing: not on a device, not while tracing."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # A fake tensor is of another type; under vmap a tensor stands for many.
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
