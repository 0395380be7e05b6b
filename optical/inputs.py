"""From what a user gives to the bundle that the operator takes: dtypes, masses, masks, offsets."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optical.arguments import Arguments
from optical.checks import (
    check_device,
    check_floating,
    check_integers,
    check_pair,
    check_shape,
    readable,
)


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
) -> Arguments:
    """Check and bundle a given cost, which both sides hold as their tokens."""
    cost = rows.tokens
    check_floating("cost", cost, "(batch, n, m)", 3)
    cost = cost.to(_compute_dtype(cost.dtype))
    batch, n, m = cost.shape
    log_a = _log_masses(rows, (batch, n), cost.dtype)
    log_b = _log_masses(columns, (batch, m), cost.dtype)
    temperatures = _temperatures(epsilon, batch, log_a, "cost")
    f0, g0 = _start(init, log_a, log_b)
    return Arguments(cost, None, "given", None, None, log_a, log_b, temperatures, f0, g0, **options)


def of_clouds(
    rows: Cloud,
    columns: Cloud,
    kind: str,
    epsilon: float | Tensor,
    init: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
) -> Arguments:
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
    return Arguments(x, y, kind, cu_a, cu_b, log_a, log_b, temperatures, f0, g0, **options)


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
