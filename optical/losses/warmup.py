"""Compile the GPU kernels of a training before it starts, in parallel."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from optical.io import nvidia
from optical.ot.functional import AlignmentOptions, Cost, ot_alignment, sinkhorn_vectors

if TYPE_CHECKING:
    from typing_extensions import Unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The longest sides that the kernels of one size serve; longer problems share those of 257.
SIDES = (16, 32, 64, 128, 256, 257)
# Numbers of problems: what is stored per problem may be aligned to 16 bytes or not, and from some
# number on one program solves a long problem.
BATCHES, LARGE_BATCH = (3, 4), 160
# Runs of this length have the kernels of longer ones.
ITERATIONS = 16


class Compiled(NamedTuple):
    """A group of kernels that ``warmup`` compiled.

    Attributes:
        problems: the problems that they serve.
        seconds: how long their first calls took, beside those of other groups.
    """

    problems: str
    seconds: float


def warmup(
    n: int,
    m: int | None = None,
    dim: int = 768,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
    cost: Cost = "cosine",
    max_iter: int = 50,
    tol: float = 0.0,
    packed: bool = False,
    device: torch.device | str = "cuda",
    threads: int | None = None,
    progress: Callable[[str], None] | None = print,
    **options: Unpack[AlignmentOptions],
) -> list[Compiled]:
    """Compile the kernels that a training on token vectors will use, forward and backward.

    Kernels are compiled at their first use, which stops a training with texts of random lengths
    many times in its first steps. This function makes those calls beforehand, on vectors of zeros,
    with several threads, and waits for the device. The results stay in the caches of Triton and of
    this package, so that later processes load them within milliseconds.

    Args:
        n: the largest number of rows of a problem, such as the student's tokens.
        m: the largest number of columns; ``n`` if None.
        dim: the length of a vector. Lengths that are multiples of 16 share their kernels.
        dtype: float32, float16 or bfloat16; or a pair of them, of the rows and of the columns.
        cost: "cosine", "sqeuclidean" or "dot".
        max_iter, tol: those of the training; a positive ``tol`` has kernels of its own.
        packed: compile for packed problems (``cu_seqlens_a`` of ``optical.sinkhorn_vectors``)
            rather than for padded ones with and without masks.
        device: a CUDA device. "cpu" builds the CPU library, where that is missing.
        threads: number of threads; one per core, at most 16, if None.
        progress: called with one line per group of kernels and one with the total time; None
            for silence.
        **options: the options of the training, since they choose kernels: gradient, rho, omega,
            anneal, precision and backend, as in ``optical.ot_alignment``.

    Returns:
        One entry per group of kernels, in the order in which they were completed.

    Raises:
        ValueError: an argument has a wrong value, or the device cannot be used; the message says
            what is missing.
        BackendUnsupported: the backend requested by name cannot solve such problems.

    Examples:
        >>> import optical
        >>> groups = optical.warmup(16, dim=8, device="cpu", progress=None)
        >>> [group.problems for group in groups]
        ['up to 16 x 16, float32, cosine']
    """
    m = n if m is None else m
    device = _checked_device(device)
    dtypes = _checked(n, m, dim, dtype)
    calls = _Calls(dim, dtypes, device, {"cost": cost, "max_iter": max_iter, "tol": tol, **options})
    groups = [("packed", [(n, m)])] if packed else _groups(n, m)
    start, compiled = time.monotonic(), []

    def run(group: tuple[str, list[tuple[int, int]]]) -> Compiled:
        began = time.monotonic()
        name, sizes = group
        # Otherwise all backward passes of a device run, and compile, in one thread.
        with torch.autograd.set_multithreading_enabled(False):
            for rows, columns in sizes:
                (calls.packed if packed else calls.padded)(rows, columns)
        problems = ", ".join((name, "/".join(dict.fromkeys(map(_name, dtypes))), cost))
        return Compiled(problems, time.monotonic() - began)

    def done(group: Compiled) -> None:
        compiled.append(group)
        if progress is not None:
            progress(f"{group.problems}: {group.seconds:.1f} s")

    # The first group loads the compilers and compiles what all share.
    done(run(groups[0]))
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        for future in as_completed([pool.submit(run, group) for group in groups[1:]]):
            done(future.result())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if progress is not None:
        progress(f"optical is warm after {time.monotonic() - start:.1f} s")
    return compiled


def _groups(n: int, m: int) -> list[tuple[str, list[tuple[int, int]]]]:
    """Group sizes up to n x m by their longest side: the kernels depend on both sides."""
    rows, columns = _sides(n), _sides(m)
    pairs = [(i, j) for i in rows for j in columns]
    groups: dict[int, list[tuple[int, int]]] = {}
    for pair in pairs:
        longest = next((side for side in SIDES if max(pair) <= side), max(n, m))
        groups.setdefault(longest, []).append(pair)
    names = {
        longest: f"up to {max(i for i, _ in sizes)} x {max(j for _, j in sizes)}"
        for longest, sizes in groups.items()
    }
    return [(names[longest], groups[longest]) for longest in sorted(groups)]


def _sides(size: int) -> list[int]:
    return [*(side for side in SIDES if side < size), size]


class _Calls:
    """Calls on vectors of zeros, forward and backward."""

    def __init__(
        self,
        dim: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        options: dict[str, Any],
    ) -> None:
        self.dim, self.dtypes, self.device, self.options = dim, dtypes, device, options

    def padded(self, n: int, m: int) -> None:
        """Solve padded problems as ``OTAlignmentLoss`` does, with and without masks."""
        large = (LARGE_BATCH,) * (max(n, m) == max(SIDES))
        for batch in (*BATCHES, *large):
            x, y = self._vectors((batch, n), (batch, m))
            # The masks of a collator are bool, those of a tokenizer int64.
            for masks in self._masks(x, y):
                self._run(functools.partial(_padded_costs, self.options, masks), x, y)

    def _masks(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        yield None, None
        for dtype in (torch.int64, torch.bool):
            shapes = x.shape[:2], y.shape[:2]
            a, b = (torch.ones(shape, dtype=dtype, device=self.device) for shape in shapes)
            yield a, b

    def packed(self, n: int, m: int) -> None:
        """Solve one packed problem, and several."""
        for batch in (1, *BATCHES, 32):
            x, y = self._vectors((batch * n,), (batch * m,))
            offsets = torch.arange(batch + 1, dtype=torch.int32, device=self.device)
            sides = {"cu_seqlens_a": offsets * n, "cu_seqlens_b": offsets * m}
            options: dict[str, Any] = {**self.options, **sides}
            self._run(functools.partial(_packed_costs, options), x, y)

    def _vectors(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        return [
            torch.zeros(*shape, self.dim, dtype=dtype, device=self.device, requires_grad=True)
            for shape, dtype in zip(shapes, self.dtypes, strict=True)
        ]

    def _run(self, costs: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        """Solve without gradients, with those of both sides, and with that of one."""
        with torch.no_grad():
            costs(x, y)
        torch.autograd.grad(costs(x, y).sum(), [x, y])
        torch.autograd.grad(costs(x, y.detach()).sum(), [x])


def _padded_costs(
    options: Any, masks: tuple[Tensor | None, Tensor | None], x: Tensor, y: Tensor
) -> Tensor:
    return ot_alignment(x, y, *masks, **options)


def _packed_costs(options: Any, x: Tensor, y: Tensor) -> Tensor:
    return sinkhorn_vectors(x, y, epsilon=0.05, **options).value_linear


def _checked_device(device: torch.device | str) -> torch.device:
    """Return the device.

    Raises:
        ValueError: it is neither a CPU nor a CUDA device that can be used.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r}; expected a device ({reason})") from None
    if found.type == "cpu":
        return found
    missing = None if torch.version.hip and torch.cuda.is_available() else nvidia.missing_device()
    if found.type != "cuda":
        raise ValueError(f"device is {str(device)!r}; expected a CUDA device or 'cpu'")
    if missing is not None:
        raise ValueError(f"device is {str(device)!r}, but {missing}")
    count = torch.cuda.device_count()
    if found.index is not None and found.index >= count:
        raise ValueError(f"device is {str(device)!r}; PyTorch finds {count} of them")
    return found


def _checked(
    n: int, m: int, dim: int, dtype: torch.dtype | Sequence[torch.dtype]
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of both sides.

    Raises:
        ValueError: an argument has a wrong value.
    """
    for name, value in (("n", n), ("m", m), ("dim", dim)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    dtypes = (dtype, dtype) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if len(dtypes) != 2 or not set(dtypes) <= set(DTYPES):
        names = ", ".join(map(_name, DTYPES))
        raise ValueError(f"dtype is {dtype!r}; expected one or two of {names}")
    return dtypes[0], dtypes[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
