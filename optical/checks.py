"""What a user's arguments must be. An error names the argument, its value and the value expected.

No check waits for a device: values are looked at only where they are at hand, on the CPU and
outside of a trace.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optical import backends
from optical.arguments import GRADIENTS, KINDS, PRECISIONS

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

    Returns the options as fields of ``optical.arguments.Arguments``.
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
    backends.check_name(backend)
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
