"""Choose the backend that solves a problem, and explain the choice.

A problem goes to another backend only if ``supports`` of a backend refuses it. Errors raised while
a backend runs are not caught, so a faulty kernel is reported instead of replaced by a slower one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optical.backends.problem import Problem, dtype_name, example_problem
from optical.io import nvidia

ENVIRONMENT_VARIABLE = "OPTICAL_BACKEND"


class BackendUnsupported(RuntimeError):
    """The requested backend cannot solve this problem; the message gives the reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator, its gradient and products with its plan.

    Attributes:
        name: the value of ``backend=``.
        load: returns the module that implements it, imported at its first use. The module has
            ``supports(problem)``, which returns None or the reason it cannot solve a problem, and
            ``forward`` and ``backward`` with the signatures of ``optical.backends.reference``.
        automatic_on: device types on which "auto" considers it; empty means all devices.
        dense: accepts only padded problems of a given cost, which ``optical.backends.dense`` makes.
        native: reads tensors of any strides, and computes by no operation of PyTorch, which
            autocast could change.
        keeps: ``forward`` fills a list, ``kept``, which ``backward`` then takes.
        applies_plan: the module has ``apply_plan``; otherwise the reference computes products.
        obstacle: returns the reason a problem cannot be solved, or None, before ``load`` imports
            anything.
        remark: what ``explain`` adds if the problem has vectors.
    """

    name: str
    load: Callable[[], Any]
    automatic_on: tuple[str, ...] = ()
    dense: bool = False
    native: bool = False
    keeps: bool = False
    applies_plan: bool = True
    obstacle: Callable[[Problem], str | None] = lambda problem: None
    remark: str = ""

    def supports(self, problem: Problem) -> str | None:
        """Return None if the backend can solve the problems, otherwise the reason it cannot."""
        reason = self.obstacle(problem)
        if reason is None:
            reason = self.load().supports(problem)
        return reason


def _module(path: str) -> Callable[[], Any]:
    return functools.cache(functools.partial(importlib.import_module, path))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels can run where a tensor is, or in Triton's interpreter."""
    if not _has_triton():
        return False
    if tensor.is_cuda:
        return _triton_device_obstacle(tensor.device.index) is None
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_obstacle(problem: Problem) -> str | None:
    if not _has_triton():
        return "the package triton is not installed"
    if runs_triton(problem.x):
        return None
    device = problem.x.device
    if problem.x.is_cuda:
        return _triton_device_obstacle(device.index)
    return f"the tensors are on {device.type}; the Triton kernels need a CUDA device"


def _triton_device_obstacle(device: int) -> str | None:
    """Return why Triton cannot compile for a device, or None."""
    obstacle = nvidia.capability_obstacle(device)
    if obstacle is not None:
        return obstacle
    if device not in _triton_probes:
        # CUDA refuses to load Triton's code during a capture, which would end it.
        if torch.cuda.is_current_stream_capturing():
            return CAPTURED_TOO_EARLY
        probe = importlib.import_module("optical.kernels.launch")
        _triton_probes[device] = probe.obstacle(device)
    return _triton_probes[device]


CAPTURED_TOO_EARLY = (
    "a CUDA graph is being captured, and no Triton kernel has been loaded before; make one call "
    "first"
)
# Device -> the reason Triton cannot compile for it, or None; asked once per device.
_triton_probes: dict[int, str | None] = {}


# The reference is the last, since it supports everything and is slow.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cuda",
            _module("optical.backends.cuda"),
            automatic_on=("cuda",),
            applies_plan=False,
            remark="packed input: a device sync if its total length exceeds the largest problem",
        ),
        Backend(
            "triton",
            _module("optical.kernels"),
            automatic_on=("cuda",),
            keeps=True,
            obstacle=_triton_obstacle,
        ),
        Backend("cpu", _module("optical.backends.cpu"), automatic_on=("cpu",), native=True),
        Backend("reference", _module("optical.backends.reference"), dense=True),
    )
}


@dataclass(frozen=True)
class Order:
    """Order in which "auto" asks the backends of a device about a class of problems.

    Attributes:
        problems: description of the class, for ``explain``.
        applies: problem, whether its gradient is computed -> whether it is of the class.
        names: backends, fastest first; others follow in the order of ``BACKENDS``.
        provenance: "predicted" or "measured".
    """

    problems: str
    applies: Callable[[Problem, bool], bool]
    names: tuple[str, ...]
    provenance: str


# The first order that applies is used. Only shapes and dtypes decide, so a problem is solved by the
# same kernels in any batch.
ORDERS: tuple[Order, ...] = (
    Order(
        "gradients of vectors, which take half as many products in Triton",
        lambda problem, gradient: gradient and problem.kind != "given",
        ("triton", "cuda"),
        "predicted",
    ),
    Order(
        "long float32 vectors except for the cosine, which only Triton multiplies on tensor cores",
        lambda problem, gradient: (
            problem.kind in ("sqeuclidean", "dot")
            and problem.x.dtype == torch.float32
            and problem.x.shape[-1] > 256
        ),
        ("triton", "cuda"),
        "predicted",
    ),
    Order("all other problems", lambda problem, _: True, ("cuda", "triton"), "predicted"),
)


def requested(name: str) -> str:
    """Resolve "auto" by the environment variable, and check the name.

    Raises:
        ValueError: ``name``, or the value of the environment variable, is unknown.
    """
    if name != "auto":
        _check_known("backend", name)
        return name
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if not from_environment:
        return "auto"
    _check_known(f"environment variable {ENVIRONMENT_VARIABLE}", from_environment)
    return from_environment


def _check_known(source: str, name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        expected = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"{source} is {name!r}; expected one of {expected}")


def _ordered(problem: Problem, gradient: bool) -> tuple[Order, list[Backend]]:
    order = next(order for order in ORDERS if order.applies(problem, gradient))
    rank = {name: i for i, name in enumerate(order.names)}
    return order, sorted(BACKENDS.values(), key=lambda backend: rank.get(backend.name, len(rank)))


_served_by_cpu: set[tuple[Any, ...]] = set()


def choose(name: str, problem: Problem, gradient: bool = False) -> Backend:
    """Return the backend called ``name``, or for "auto" the first that supports the problems.

    Args:
        name: a backend, or "auto".
        problem: the problems.
        gradient: whether their gradient is computed, for which ``ORDERS`` may differ.

    Raises:
        ValueError: the name is unknown.
        BackendUnsupported: the backend of this name cannot solve the problems.
    """
    name = requested(name)
    device = problem.x.device.type
    cpu = BACKENDS.get("cpu")
    if device == "cpu" and cpu is not None and name in ("auto", "cpu"):
        # Asking takes as long as a small solve. On a CPU, the answer depends on little.
        module = cpu.load()
        loaded = module.library.load_cpu() if hasattr(module, "library") else None
        question = problem.log_a.dtype, problem.gradient, problem.anneal_start > 0
        key = (module.supports, loaded, *question)
        if key in _served_by_cpu:
            return cpu
        if cpu.supports(problem) is None:
            _served_by_cpu.add(key)
            return cpu
    if name != "auto":
        backend = BACKENDS[name]
        reason = backend.supports(problem)
        if reason is not None:
            raise BackendUnsupported(f"backend {name!r} cannot serve this problem: {reason}")
        return backend

    refusals: list[str] = []
    for backend in _ordered(problem, gradient)[1]:
        if backend.automatic_on and device not in backend.automatic_on:
            continue
        reason = backend.supports(problem)
        if reason is None:
            if refusals and not backend.automatic_on:
                _warn_once("optical runs its plain PyTorch reference: " + "; ".join(refusals))
            return backend
        refusals.append(f"{backend.name}: {reason}")
    raise AssertionError("the reference supports every problem")


def explain(
    cost: Tensor,
    backend: str = "auto",
    *,
    y: Tensor | None = None,
    kind: str = "given",
    **options: Any,
) -> str:
    """List the backends, the reason each does or does not support a problem, and the one chosen.

    Args:
        cost: (batch, n, m) cost; with ``y``, the vectors of the rows, (batch, n, dim).
        backend: "auto", or the name of a backend.
        y: (batch, m, dim) vectors of the columns.
        kind: with ``y``, "cosine", "sqeuclidean" or "dot".
        **options: fields of ``optical.backends.Problem``, such as ``gradient="implicit"``.

    Returns:
        One line for the problem and one per backend; ``->`` marks the backend chosen.

    Raises:
        ValueError: the name of the backend is unknown.

    Examples:
        >>> import torch
        >>> from optical.backends import explain
        >>> print(explain(torch.zeros(2, 3, 4), backend="reference").splitlines()[0])
        cost (2, 3, 4) float32 on cpu, backend='reference'
    """
    name = requested(backend)
    problem = example_problem(cost, y, kind, **options)
    source = "cost" if y is None else f"{kind} cost of x {tuple(cost.shape)} and y"
    shape = tuple(cost.shape if y is None else y.shape)
    lines = [f"{source} {shape} {dtype_name(cost.dtype)} on {cost.device}, backend={backend!r}"]
    if name != backend:
        lines[0] += f" ({ENVIRONMENT_VARIABLE}={name})"
    order, candidates = _ordered(problem, False)
    chosen = None
    for candidate in candidates:
        reason = candidate.supports(problem)
        if name == "auto":
            eligible = not candidate.automatic_on or cost.device.type in candidate.automatic_on
        else:
            eligible = candidate.name == name
        marker = "  "
        if chosen is None and eligible and reason is None:
            chosen, marker = candidate, "->"
        supported = "supported"
        if candidate.remark and kind != "given":
            supported += f"; {candidate.remark}"
        lines.append(f"{marker} {candidate.name:<10} {reason or supported}")
    if name == "auto" and cost.device.type == "cuda":
        lines.append(f"order of cuda and triton: {order.provenance}, for {order.problems}")
        first = _ordered(problem, True)[1][0].name
        lines.append(f"order for the gradient: {first} first")
    return "\n".join(lines)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
