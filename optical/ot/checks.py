"""Checks of options and of tensor arguments.

Messages name the argument, its value and the expected value. Checks never synchronise with a
device: values are inspected only where ``values_available``.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from optical.backends.problem import BACKEND_NAMES, GRADIENTS, KINDS, PRECISIONS

MAX_MEMORY = 16  # of Anderson acceleration
MAX_ITERATIONS = 2**31 - 1  # the libraries count in 32 bits
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# A subclass may mean anything by its values; these two mean what a tensor means.
CONCRETE = (Tensor, torch.nn.Parameter)


# ----------------------------------------------------------------------------------------- options


class Options(NamedTuple):
    """The validated options, as the last fields of ``optical.backends.Problem``, in their order."""

    max_iter: int
    tol: float
    rho_a: float
    rho_b: float
    omega: float
    anderson: int
    anneal_start: float
    anneal_ratio: float
    gradient: str
    low_memory: bool
    precision: str
    backend: str


def check_options(
    function: str,
    *,
    epsilon: float | Tensor,
    max_iter: int = 100,
    tol: float = 0.0,
    rho: Any = None,
    omega: float = 1.0,
    anderson: int = 0,
    anneal: tuple[float, float] | None = None,
    gradient: str = "envelope",
    backend: str = "auto",
    low_memory: bool = False,
    precision: str = "exact",
    cost: str = "cosine",
    **unknown: Any,
) -> Options:
    """Validate the options that can be checked without tensors.

    Args:
        function: the public function or class, for the message about an unknown option.
        **unknown: options that do not exist.
        epsilon, max_iter, tol, rho, omega, anderson, anneal: see ``optical.sinkhorn``.
        gradient, backend, low_memory, precision, cost: see ``optical.sinkhorn_vectors``.

    Raises:
        TypeError, ValueError: an option has a wrong name, type or value.
    """
    if unknown:
        refuse_unknown(function, unknown, OPTION_NAMES)
    if not isinstance(epsilon, Tensor):
        if isinstance(epsilon, bool) or not isinstance(epsilon, (float, numbers.Real)):
            found = type(epsilon).__name__
            raise TypeError(f"epsilon is a {found}; expected a float or a tensor (batch,)")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}; expected a finite number > 0")
    values: tuple[Any, ...] = (max_iter, tol, rho, omega, anderson, anneal)
    values += (gradient, backend, low_memory, precision, cost)
    # The cache distinguishes 1 from True, but not inside of a tuple.
    simple = anneal is None and not isinstance(rho, (tuple, list, dict, set))
    check = _check if simple and not torch.compiler.is_compiling() else _check.__wrapped__
    options = check(*values)
    if anneal is not None and not isinstance(epsilon, Tensor):
        _check_annealing_ends(options, float(epsilon))
    return options


OPTION_NAMES = (
    *("epsilon", "max_iter", "tol", "rho", "omega", "anderson", "anneal", "gradient", "backend"),
    *("low_memory", "precision", "cost"),
)


def refuse_unknown(function: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for an option that ``function`` does not have, naming the nearest one.

    Args:
        function: the public function or class.
        unknown: names of the options given in error; the first is reported.
        known: names of its arguments.
    """
    name, known = next(iter(unknown)), list(known)
    aliases = {"reg": "epsilon", "eps": "epsilon", "blur": "epsilon", "numItermax": "max_iter"}
    aliases |= {"stopThr": "tol", "threshold": "tol", "iterations": "max_iter", "reg_m": "rho"}
    nearest = [aliases[name]] if name in aliases else difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; expected {', '.join(known)}"
    raise TypeError(f"{function} has no option {name!r}{hint}")


@functools.lru_cache(maxsize=256, typed=True)
def _check(
    max_iter: Any,
    tol: Any,
    rho: Any,
    omega: Any,
    anderson: Any,
    anneal: Any,
    gradient: Any,
    backend: Any,
    low_memory: Any,
    precision: Any,
    cost: Any,
) -> Options:
    max_iter = _integer("max_iter", max_iter, 0, MAX_ITERATIONS)
    tol = _number("tol", tol)
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol is {tol}; expected a finite number >= 0")
    rho_a, rho_b = _penalties(rho)
    omega = _number("omega", omega)
    if not 0 < omega < 2:
        raise ValueError(f"omega is {omega}; expected a number between 0 and 2")
    anderson = _integer("anderson", anderson, 0, MAX_MEMORY)
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
    _check_choice("cost", cost, (*KINDS[1:], "euclidean"))
    if not isinstance(backend, str):
        raise TypeError(f"backend is a {type(backend).__name__}; expected a str")
    _check_choice("backend", backend, BACKEND_NAMES)
    return Options(
        *(max_iter, tol, rho_a, rho_b, omega, anderson, anneal_start, anneal_ratio),
        *(gradient, low_memory, precision, backend),
    )


def _check_annealing_ends(options: Options, epsilon: float) -> None:
    """Raise unless the last iteration runs at epsilon: a plan would mix two temperatures."""
    start, ratio, count = options.anneal_start, options.anneal_ratio, options.max_iter
    if count == 0 or last_temperature(options) <= epsilon:
        return
    needed = 1 + math.ceil(math.log(epsilon / start) / math.log(ratio))
    needed += start * ratio ** (needed - 1) > epsilon  # against rounding of the logarithms
    raise ValueError(
        f"anneal is {(start, ratio)}, which reaches epsilon={epsilon} at iteration {needed}; "
        f"expected max_iter >= {needed}, not {count}"
    )


def last_temperature(options: Options) -> float:
    """Return the annealing temperature of the last iteration, before epsilon bounds it."""
    return options.anneal_start * options.anneal_ratio ** max(options.max_iter - 1, 0)


def _penalties(rho: Any) -> tuple[float, float]:
    """Return rho_a and rho_b, inf for a fixed marginal."""
    pair = (rho, rho)
    if isinstance(rho, (tuple, list)):
        pair = check_pair("rho", rho, "(rho_a, rho_b)")
    strengths = []
    for strength in pair:
        if strength is None:
            strength = math.inf
        if isinstance(strength, bool) or not isinstance(strength, (float, numbers.Real)):
            expected = "None, a number > 0, or a pair of these"
            raise TypeError(f"rho holds a {type(strength).__name__}; expected {expected}")
        strength = cast(float, strength)
        if not strength > 0:
            raise ValueError(f"rho is {rho}; expected numbers > 0 (None or inf: a fixed marginal)")
        strengths.append(float(strength))
    return strengths[0], strengths[1]


def split_penalties(rho: Any) -> tuple[Any, Tensor | None]:
    """Split rho into numbers and (batch,) strengths, by which a number of 1 is to be replaced."""
    if rho is None:
        return None, None
    pair = tuple(rho) if isinstance(rho, (tuple, list)) and len(rho) == 2 else (rho, rho)
    tensors = [strength for strength in pair if isinstance(strength, Tensor)]
    if not tensors:
        return rho, None
    if any(strength is not tensors[0] and strength is not None for strength in pair):
        raise ValueError(
            "rho holds a tensor and another strength; expected one tensor (batch,) for both sides, "
            "or a pair of it and None"
        )
    return tuple(None if strength is None else 1.0 for strength in pair), tensors[0]


def _annealing(anneal: Any) -> tuple[float, float]:
    """Return the start and ratio of annealing; a start of 0 disables it."""
    if anneal is None:
        return 0.0, 0.5
    pair = check_pair("anneal", anneal, "(start, ratio)")
    start, ratio = _number("anneal", pair[0]), _number("anneal", pair[1])
    if not (0 < start < math.inf and 0 < ratio < 1):
        expected = "a finite start > 0 and a ratio between 0 and 1"
        raise ValueError(f"anneal is {pair}; expected {expected}")
    return start, ratio


def check_pair(name: str, value: Any, layout: str) -> tuple[Any, Any]:
    """Return the two entries of a tuple or list."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a pair {layout}")
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} entries; expected a pair {layout}")
    return value[0], value[1]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a float")
    return float(value)


def _integer(name: str, value: Any, least: int, most: int) -> int:
    expected = f"an int >= {least}" if most == MAX_ITERATIONS else f"an int from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}")
    value = cast(int, value)
    if value < least or (value > most and most != MAX_ITERATIONS):
        raise ValueError(f"{name} is {value}; expected {expected}")
    if value > most:
        raise ValueError(f"{name} is {value}; expected an int < 2**31")
    return int(value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}; expected one of {expected}")


# ----------------------------------------------------------------------------------------- tensors


def tracing() -> bool:
    """Whether the call is being compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def dispatched() -> bool:
    """Whether a dispatch mode or a transform of ``torch.func`` sees every operation."""
    return bool(torch._C._len_torch_dispatch_stack()) or (
        torch._C._are_functorch_transforms_active()
    )


def values_available(tensor: Tensor) -> bool:
    """Whether the values can be read without a device sync and outside tracing."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # A fake tensor is of another type; under vmap, one tensor represents many.
    return (
        type(tensor) in CONCRETE
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_floating(name: str, value: Any, layout: str, dim: int, *, least: bool = False) -> None:
    """Raise unless ``value`` is a dense floating-point tensor of ``dim`` dimensions.

    ``least``: or more dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {_type_name(value)}; expected a tensor {layout}")
    if value.dtype not in FLOATING:
        expected = "float64, float32, float16 or bfloat16"
        raise TypeError(f"{name} has dtype {value.dtype}; expected {expected}")
    if value.layout is not torch.strided or value.is_nested:
        found = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        hint = "; pad it, or pack it and pass cu_seqlens" if value.is_nested else ""
        raise TypeError(f"{name} is a {found} tensor; expected a dense tensor {layout}{hint}")
    if value.dim() != dim and not (least and value.dim() > dim):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {layout}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on the same device."""
    if value.device != other.device:
        expected = f"{other.device}, where {other_name} is"
        raise ValueError(f"{name} is on {value.device}; expected {expected}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], reason: str) -> None:
    """Raise unless the tensor has exactly this shape; ``reason`` ends the message."""
    if value.shape != shape:
        found, expected = tuple(value.shape), tuple(shape)
        raise ValueError(f"{name} has shape {found}; expected {expected}, {reason}")


def check_integers(name: str, value: Any, layout: str) -> None:
    """Raise unless ``value`` is an integer tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {_type_name(value)}; expected an integer tensor {layout}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {value.dtype}; expected int64 or int32")


def _type_name(value: Any) -> str:
    kind = type(value)
    return "numpy array" if kind.__module__ == "numpy" else kind.__name__


Lead = tuple[int, ...]  # leading dimensions of the caller's tensors


def fold(tensor: Tensor, lead: Lead) -> Tensor:
    """Merge the leading dimensions ``lead`` of a tensor into one."""
    return tensor.unsqueeze(0) if not lead else tensor.flatten(0, len(lead) - 1)


def unfold(tensor: Tensor, lead: Lead | None) -> Tensor:
    """Undo ``fold``; ``lead`` is None if nothing was folded."""
    return tensor if lead is None else tensor.reshape((*lead, *tensor.shape[1:]))
