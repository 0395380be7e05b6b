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

import torch
from torch import Tensor

from optical import reference
from optical.reference import Outputs

ENVIRONMENT_VARIABLE = "OPTICAL_BACKEND"


class BackendUnsupported(RuntimeError):
    """A backend chosen by name cannot serve this problem; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator and of its gradient.

    Attributes:
        name: what users write in ``backend=``.
        automatic_on: device types on which ``"auto"`` considers it; empty means every device.
        supports: cost -> None when it can serve it, otherwise the reason in words.
        forward: (cost, log_a, log_b, epsilon, max_iter, tol) -> the six outputs.
        backward: (cost, log_a, log_b, epsilon, f, g, grad_value, grad_value_linear) -> grad_cost.
    """

    name: str
    automatic_on: tuple[str, ...]
    supports: Callable[[Tensor], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Outputs]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _triton_supports(cost: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not cost.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {cost.device.type}; the Triton kernel needs a CUDA device"
    if cost.dtype != torch.float32:
        return f"cost is {_name(cost.dtype)}; the Triton kernel computes in float32"
    from optical import kernels

    n, m = cost.shape[1:]
    if max(n, m) > kernels.MAX_TOKENS:
        limit = kernels.MAX_TOKENS
        return f"cost is {n} x {m}; the register-resident kernel handles up to {limit} x {limit}"
    return None


def _triton_forward(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, max_iter: int, tol: float
) -> Outputs:
    from optical import kernels

    return kernels.sinkhorn_forward(cost, log_a, log_b, epsilon, max_iter, tol)


def _triton_backward(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    grad_value: Tensor,
    grad_value_linear: Tensor,
) -> Tensor:
    from optical import kernels

    return kernels.sinkhorn_backward(
        cost, log_a, log_b, epsilon, f, g, grad_value, grad_value_linear
    )


def _cpu_supports(cost: Tensor) -> str | None:
    if cost.device.type != "cpu":
        return f"the tensors are on {cost.device.type}; the native library runs on the cpu"
    if cost.dtype not in (torch.float32, torch.float64):
        return f"cost is {_name(cost.dtype)}; the native library computes in float32 or float64"
    from optical import native

    return native.unavailable_reason()


def _cpu_forward(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, max_iter: int, tol: float
) -> Outputs:
    from optical import native

    return native.forward(_dense_rows(cost), log_a, log_b, epsilon, max_iter, tol)


def _cpu_backward(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    grad_value: Tensor,
    grad_value_linear: Tensor,
) -> Tensor:
    from optical import native

    return native.backward(
        _dense_rows(cost), log_a, log_b, epsilon, f, g, grad_value, grad_value_linear
    )


def _reference_supports(cost: Tensor) -> str | None:
    return None


# "auto" tries these in order; the reference is last because it serves everything, slowly.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("triton", ("cuda",), _triton_supports, _triton_forward, _triton_backward),
        Backend("cpu", ("cpu",), _cpu_supports, _cpu_forward, _cpu_backward),
        Backend(
            "reference",
            (),
            _reference_supports,
            reference.sinkhorn,
            reference.sinkhorn_backward,
        ),
    )
}


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


def choose(name: str, cost: Tensor) -> Backend:
    """The backend that serves ``cost``: the one named, or the first of the table for ``"auto"``.

    Raises:
        ValueError: the name is unknown.
        BackendUnsupported: a backend asked for by name cannot serve the problem.
    """
    name = requested(name)
    if name != "auto":
        backend = BACKENDS[name]
        reason = backend.supports(cost)
        if reason is not None:
            raise BackendUnsupported(f"backend {name!r} cannot serve this problem: {reason}")
        return backend

    refusals: list[str] = []
    for backend in BACKENDS.values():
        if backend.automatic_on and cost.device.type not in backend.automatic_on:
            continue
        reason = backend.supports(cost)
        if reason is None:
            if refusals and not backend.automatic_on:
                _warn_once("optical runs its plain PyTorch reference: " + "; ".join(refusals))
            return backend
        refusals.append(f"{backend.name}: {reason}")
    raise AssertionError("the reference serves every problem")


def explain(cost: Tensor, backend: str = "auto") -> str:
    """Say which backend serves ``cost`` (batch, n, m), and why each other one does or does not.

    Example:
        >>> import torch
        >>> from optical.backends import explain
        >>> print(explain(torch.zeros(2, 3, 4), backend="reference").splitlines()[0])
        cost (2, 3, 4) float32 on cpu, backend='reference'
    """
    name = requested(backend)
    shape = tuple(cost.shape)
    lines = [f"cost {shape} {_name(cost.dtype)} on {cost.device}, backend={backend!r}"]
    if name != backend:
        lines[0] += f" ({ENVIRONMENT_VARIABLE}={name})"
    chosen = None
    for candidate in BACKENDS.values():
        reason = candidate.supports(cost)
        if name == "auto":
            eligible = not candidate.automatic_on or cost.device.type in candidate.automatic_on
        else:
            eligible = candidate.name == name
        taken = chosen is None and eligible and reason is None
        chosen = candidate if taken else chosen
        marker = "->" if taken else "  "
        lines.append(f"{marker} {candidate.name:<10} {reason or 'supported'}")
    return "\n".join(lines)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _dense_rows(cost: Tensor) -> Tensor:
    return cost if cost.stride(-1) == 1 else cost.contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
