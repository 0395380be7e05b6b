"""The table of implementations: what each one supports, why not, and which one runs.

Only a backend's own ``supports`` can send a problem elsewhere. Any error raised while an
implementation runs reaches the user: a kernel's bug must not look like a slow kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optical import reference
from optical.arguments import Arguments, Gradients, Outputs, example

ENVIRONMENT_VARIABLE = "OPTICAL_BACKEND"


class BackendUnsupported(RuntimeError):
    """A backend chosen by name cannot serve this problem; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator, of its gradient and of products with its plan.

    Attributes:
        name: what users write in ``backend=``.
        automatic_on: device types on which ``"auto"`` considers it; empty means every device.
        remark: what ``explain`` adds where it serves vectors.
        dense: it only ever sees padded problems with a given cost; ``optical.dense`` makes them.
        supports: arguments -> None when it can serve them, otherwise the reason in words.
        forward, backward, apply_plan: as in ``optical.reference``.
    """

    name: str
    automatic_on: tuple[str, ...]
    dense: bool
    supports: Callable[[Arguments], str | None]
    forward: Callable[[Arguments], Outputs]
    backward: Callable[..., Gradients]
    apply_plan: Callable[[Arguments, Tensor, Tensor, Tensor, bool], Tensor]
    remark: str = ""


def _cuda_supports(arguments: Arguments) -> str | None:
    from optical import cuda

    return cuda.supports(arguments)


def _cuda_forward(arguments: Arguments) -> Outputs:
    from optical import cuda

    return cuda.forward(arguments)


def _cuda_backward(*upstream_arguments_and_outputs: Any) -> Gradients:
    from optical import cuda

    return cuda.backward(*upstream_arguments_and_outputs)


def _cuda_apply_plan(
    arguments: Arguments, f: Tensor, g: Tensor, v: Tensor, transpose: bool
) -> Tensor:
    from optical import cuda

    return cuda.apply_plan(arguments, f, g, v, transpose)


def _triton_supports(arguments: Arguments) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    x = arguments.x
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {x.device.type}; the Triton kernels need a CUDA device"
    from optical import kernels

    return kernels.supports(arguments)


def _triton_forward(arguments: Arguments) -> Outputs:
    from optical import kernels

    return kernels.forward(arguments)


def _triton_backward(*upstream_arguments_and_outputs: Any) -> Gradients:
    from optical import kernels

    return kernels.backward(*upstream_arguments_and_outputs)


def _triton_apply_plan(
    arguments: Arguments, f: Tensor, g: Tensor, v: Tensor, transpose: bool
) -> Tensor:
    from optical import kernels

    return kernels.apply_plan(arguments, f, g, v, transpose)


def _cpu_supports(arguments: Arguments) -> str | None:
    x, dtype = arguments.x, arguments.log_a.dtype
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}; the native library runs on the cpu"
    if dtype not in (torch.float32, torch.float64):
        return f"the problem is {_name(dtype)}; the native library computes in float32 or float64"
    from optical import native

    if arguments.gradient == "unroll" and arguments.anneal_start > 0:
        return "gradient='unroll' does not undo annealing in the native library"
    return native.unavailable_reason()


def _cpu_forward(arguments: Arguments) -> Outputs:
    from optical import cpu

    return cpu.forward(arguments)


def _cpu_backward(*upstream_arguments_and_outputs: Any) -> Gradients:
    from optical import cpu

    return cpu.backward(*upstream_arguments_and_outputs)


def _cpu_apply_plan(
    arguments: Arguments, f: Tensor, g: Tensor, v: Tensor, transpose: bool
) -> Tensor:
    from optical import cpu

    return cpu.apply_plan(arguments, f, g, v, transpose)


def _reference_supports(arguments: Arguments) -> str | None:
    return None


# The reference is last because it serves everything, slowly.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cuda",
            ("cuda",),
            False,
            _cuda_supports,
            _cuda_forward,
            _cuda_backward,
            _cuda_apply_plan,
            "packed with more lines than fit in one problem, it waits for the longest lengths",
        ),
        Backend(
            "triton",
            ("cuda",),
            False,
            _triton_supports,
            _triton_forward,
            _triton_backward,
            _triton_apply_plan,
        ),
        Backend(
            "cpu",
            ("cpu",),
            False,
            _cpu_supports,
            _cpu_forward,
            _cpu_backward,
            _cpu_apply_plan,
        ),
        Backend(
            "reference",
            (),
            True,
            _reference_supports,
            reference.forward,
            reference.backward,
            reference.apply_plan,
        ),
    )
}


@dataclass(frozen=True)
class Order:
    """In which order ``"auto"`` tries the backends that are considered on a device.

    Attributes:
        what: the problems, in words.
        applies: arguments, whether it is the gradient that is wanted -> whether it is about them.
        names: backends, the fastest first; those that are not named come after them, in the order
            of ``BACKENDS``.
        provenance: how that is known.
    """

    what: str
    applies: Callable[[Arguments, bool], bool]
    names: tuple[str, ...]
    provenance: str


# The first that applies counts. Only shapes and types decide, so that a problem is solved by the
# same kernels in any batch.
ORDERS: tuple[Order, ...] = (
    Order(
        "gradients of vectors, which take half as many products in Triton",
        lambda p, gradient: gradient and p.kind != "given",
        ("triton", "cuda"),
        "predicted",
    ),
    Order(
        "long float32 vectors but for the cosine, which only Triton gives to the tensor cores",
        lambda p, gradient: (
            p.kind in ("sqeuclidean", "dot") and p.x.dtype == torch.float32 and p.x.shape[-1] > 256
        ),
        ("triton", "cuda"),
        "predicted",
    ),
    Order("everything else", lambda p, _: True, ("cuda", "triton"), "predicted"),
)


def check_name(name: str) -> None:
    """Raise TypeError or ValueError unless ``name`` is ``"auto"`` or a backend of the table."""
    if not isinstance(name, str):
        raise TypeError(f"backend is a {type(name).__name__}; expected a str")
    _check_known("backend", name)


def requested(name: str) -> str:
    """The name to use now: the environment variable replaces ``"auto"`` and nothing else."""
    check_name(name)
    if name != "auto":
        return name
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    _check_known(f"environment variable {ENVIRONMENT_VARIABLE}", from_environment)
    return from_environment


def _check_known(what: str, name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        wanted = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"{what} is {name!r}; expected one of {wanted}")


def _ordered(arguments: Arguments, gradient: bool) -> tuple[Order, list[Backend]]:
    order = next(order for order in ORDERS if order.applies(arguments, gradient))
    place = {name: i for i, name in enumerate(order.names)}
    return order, sorted(BACKENDS.values(), key=lambda backend: place.get(backend.name, len(place)))


def choose(name: str, arguments: Arguments, gradient: bool = False) -> Backend:
    """The backend that serves the problems: the one named, or for ``"auto"`` the first that can.

    Args:
        name: a backend, or ``"auto"``.
        arguments: the problems.
        gradient: whether their gradient is wanted, for which ``ORDERS`` may name another.

    Raises:
        ValueError: the name is unknown.
        BackendUnsupported: a backend asked for by name cannot serve the problems.
    """
    name = requested(name)
    if name != "auto":
        backend = BACKENDS[name]
        reason = backend.supports(arguments)
        if reason is not None:
            raise BackendUnsupported(f"backend {name!r} cannot serve this problem: {reason}")
        return backend

    refusals: list[str] = []
    for backend in _ordered(arguments, gradient)[1]:
        if backend.automatic_on and arguments.x.device.type not in backend.automatic_on:
            continue
        reason = backend.supports(arguments)
        if reason is None:
            if refusals and not backend.automatic_on:
                _warn_once("optical runs its plain PyTorch reference: " + "; ".join(refusals))
            return backend
        refusals.append(f"{backend.name}: {reason}")
    raise AssertionError("the reference serves every problem")


def explain(
    cost: Tensor,
    backend: str = "auto",
    *,
    y: Tensor | None = None,
    kind: str = "given",
    **options: Any,
) -> str:
    """Say which backend serves ``cost`` (batch, n, m), and why each other one does or does not.

    For token vectors give x (batch, n, dim) in the place of the cost, y (batch, m, dim) and
    ``kind="cosine"``, say. ``options`` are fields of ``optical.arguments.Arguments`` by name, such
    as ``gradient="implicit"`` or ``rho_a=1.0``.

    Examples:
        >>> import torch
        >>> from optical.backends import explain
        >>> print(explain(torch.zeros(2, 3, 4), backend="reference").splitlines()[0])
        cost (2, 3, 4) float32 on cpu, backend='reference'
    """
    name = requested(backend)
    arguments = example(cost, y, kind, **options)
    what = "cost" if y is None else f"{kind} cost of x {tuple(cost.shape)} and y"
    shape = tuple(cost.shape if y is None else y.shape)
    lines = [f"{what} {shape} {_name(cost.dtype)} on {cost.device}, backend={backend!r}"]
    if name != backend:
        lines[0] += f" ({ENVIRONMENT_VARIABLE}={name})"
    chosen = None
    order, candidates = _ordered(arguments, False)
    for candidate in candidates:
        reason = candidate.supports(arguments)
        if name == "auto":
            eligible = not candidate.automatic_on or cost.device.type in candidate.automatic_on
        else:
            eligible = candidate.name == name
        taken = chosen is None and eligible and reason is None
        chosen = candidate if taken else chosen
        marker = "->" if taken else "  "
        served = "supported"
        if candidate.remark and kind != "given":
            served += f"; {candidate.remark}"
        lines.append(f"{marker} {candidate.name:<10} {reason or served}")
    if name == "auto" and cost.device.type == "cuda":
        lines.append(f"order of cuda and triton: {order.provenance}, for {order.what}")
        first = _ordered(arguments, True)[1][0].name
        lines.append(f"order for the gradient: {first} first")
    return "\n".join(lines)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
