"""CPU backend: passes tensors to the compiled library of ``csrc/cpu``."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from optical.backends import library, structs
from optical.backends.problem import Gradients, Problem, Solution, dtype_name

# The error codes of csrc/sinkhorn.h.
OUT_OF_MEMORY, INVALID_OFFSETS, INVALID_MASK = 2, 3, 5

# Entries times visits that take about 0.3 s on one core.
LONG = 2e9


class InvalidMask(Exception):
    """An entry of a mask is neither 0 nor 1."""


def supports(problem: Problem) -> str | None:
    """Return None if the library can solve the problems, otherwise the reason it cannot."""
    device, dtype = problem.x.device.type, problem.log_a.dtype
    if device != "cpu":
        return f"the tensors are on {device}; the native library runs on the cpu"
    if dtype not in (torch.float32, torch.float64):
        found = dtype_name(dtype)
        return f"the problem is {found}; the native library computes in float32 or float64"
    if problem.gradient == "unroll" and problem.anneal_start > 0:
        return "gradient='unroll' does not undo annealing in the native library"
    return library.load_cpu().reason


def forward(problem: Problem) -> Solution:
    """Solve a batch of problems whose tensors are on the CPU.

    Allocates the outputs and a workspace of one problem per thread, and no (B, n, m) tensor if the
    cost is computed from vectors.
    """
    problem = _prepare(problem)
    solution = Solution.allocate(problem)
    pointers = structs.address_struct(structs.SolutionStruct, solution._asdict())
    _call("optical_sinkhorn_forward", problem, solution, problem.max_iter, ctypes.byref(pointers))
    return solution


def backward(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    problem: Problem,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    z: Tensor,
    n_iter: Tensor,
    need_x: bool,
    need_y: bool,
) -> Gradients:
    """Compute the gradients that ``problem.gradient`` names; f to n_iter are of its solution."""
    problem = _prepare(problem)
    x, y, dtype = problem.x, problem.y, problem.epsilon.dtype
    grad_x = torch.empty(x.shape, dtype=dtype) if need_x else None
    grad_y = torch.empty(y.shape, dtype=dtype) if need_y and y is not None else None
    grad_log_a, grad_log_b = torch.empty_like(problem.log_a), torch.empty_like(problem.log_b)
    floating = {
        "grad_value": grad_value,
        "grad_value_linear": grad_value_linear,
        "grad_f": grad_f,
        "grad_g": grad_g,
        "f": f,
        "g": g,
        "w": w,
        "z": z,
    }
    inputs = {name: None if t is None else t.contiguous() for name, t in floating.items()}
    _check(dtype, *inputs.values())
    inputs["n_iter"] = n_iter.contiguous()
    outputs = {
        "grad_x": grad_x,
        "grad_y": grad_y,
        "grad_log_a": grad_log_a,
        "grad_log_b": grad_log_b,
    }
    tensors = inputs | outputs
    pointers = structs.address_struct(structs.GradientStruct, tensors)
    visits = 3 * problem.max_iter if problem.gradient == "unroll" else 2
    _call("optical_sinkhorn_backward", problem, tensors, visits, ctypes.byref(pointers))
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        None if grad_y is None or y is None else grad_y.to(y.dtype),
        grad_log_a,
        grad_log_b,
    )


def apply_plan(problem: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """Multiply the plan, or its transpose, with one vector of v per column (per row), by tiles."""
    problem = _prepare(problem)
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    _check(problem.epsilon.dtype, f, g, v)
    out = v.new_empty(*(problem.log_b if transpose else problem.log_a).shape, v.shape[-1])
    pointers = f.data_ptr(), g.data_ptr(), v.data_ptr()
    options = v.shape[-1], int(transpose), out.data_ptr()
    visits = 2 + v.shape[-1] // 8
    _call("optical_apply_plan", problem, (f, g, v, out), visits, *pointers, *options)
    return out


def plan(problem: Problem, f: Tensor, g: Tensor, log: bool) -> Tensor:
    """Compute the plan (B, n, m) of padded problems, or its exponent, without another such array.

    The exponent is computed in float64 and the result rounded once to the dtype of f.
    """
    problem = _prepare(problem)
    f, g = f.contiguous(), g.contiguous()
    _check(problem.epsilon.dtype, f, g)
    out = f.new_empty(*f.shape, g.shape[1])
    pointers = f.data_ptr(), g.data_ptr(), int(log), out.data_ptr()
    _call("optical_plan", problem, (f, g, out), 4, *pointers)
    return out


def equal_masses(
    batch: int,
    n: int,
    dtype: torch.dtype,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Compute log-masses (batch, n): -log(count) for the valid entries of a problem, else -inf.

    Args:
        batch, n: shape of the result.
        dtype: float32 or float64.
        mask: (batch, n) on the CPU, of any strides; bool or 0/1 numbers, and 0 marks padding.
        lengths: (batch,) int32 or int64 on the CPU; entries from this index on are padding.

    Raises:
        InvalidMask: an entry of the mask is neither 0 nor 1.
    """
    log_mass = torch.empty((batch, n), dtype=dtype)
    of_mask: tuple[int | None, ...] = (None, 0, 0, 0)
    of_lengths: tuple[int | None, ...] = (None, 0, 0)
    if mask is not None:
        if mask.shape != log_mass.shape or not mask.is_cpu:
            raise ValueError(f"mask is {(*mask.shape,)} on {mask.device}; expected {(batch, n)}")
        of_mask = mask.data_ptr(), structs.MASK_CODES.get(mask.dtype, -1), *mask.stride()
    elif lengths is not None:
        if lengths.shape != (batch,) or not lengths.is_cpu:
            found = f"{(*lengths.shape,)} on {lengths.device}"
            raise ValueError(f"lengths is {found}; expected {(batch,)}")
        of_lengths = (
            lengths.data_ptr(),
            structs.MASK_CODES.get(lengths.dtype, -1),
            lengths.stride(0),
        )
    precision = structs.DTYPE_CODES[dtype]
    fill = structs.with_argument_types(library.load_cpu().require()).optical_equal_masses
    status = fill(batch, n, precision, *of_mask, *of_lengths, log_mass.data_ptr())
    if status == INVALID_MASK:
        raise InvalidMask
    if status != 0:
        raise TypeError(f"lengths or the result have a dtype that is not supported: {dtype}")
    return log_mass


def _prepare(problem: Problem) -> Problem:
    """Check dtypes and devices, and make contiguous the tensors that the library reads so.

    A given cost is read with any strides, and vectors with any but that of their entries, so
    neither is copied.
    """
    x, y, cu_a, cu_b = problem.x, problem.y, problem.cu_a, problem.cu_b
    dtype = problem.epsilon.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"epsilon is {dtype}; expected torch.float32 or torch.float64")
    if y is None:
        _check(dtype, x)
        x = x.resolve_neg()
    else:
        x, y = _adjacent("x", x), _adjacent("y", y)
    f0, g0 = problem.f0, problem.g0
    prepared = problem._replace(
        x=x,
        y=y,
        cu_a=None if cu_a is None else cu_a.to(torch.int64).contiguous(),
        cu_b=None if cu_b is None else cu_b.to(torch.int64).contiguous(),
        log_a=problem.log_a.contiguous(),
        log_b=problem.log_b.contiguous(),
        epsilon=problem.epsilon.contiguous(),
        f0=None if f0 is None else f0.contiguous(),
        g0=None if g0 is None else g0.contiguous(),
    )
    _check(dtype, prepared.log_a, prepared.log_b, prepared.f0, prepared.g0)
    return prepared


def _adjacent(name: str, vectors: Tensor) -> Tensor:
    """Return vectors whose entries are adjacent in memory, in a dtype that the library reads."""
    if vectors.device.type != "cpu" or vectors.dtype not in structs.DTYPE_CODES:
        expected = ", ".join(str(dtype) for dtype in structs.DTYPE_CODES)
        raise TypeError(
            f"{name} is {vectors.dtype} on {vectors.device}; expected {expected} on cpu"
        )
    adjacent = vectors.stride(-1) == 1 or vectors.shape[-1] == 1
    return vectors.resolve_neg() if adjacent else vectors.contiguous()


def _check(dtype: torch.dtype, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and (tensor.dtype != dtype or tensor.device.type != "cpu"):
            found = f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"a tensor is {found}; expected {dtype} on cpu, like epsilon")


def _call(name: str, problem: Problem, tensors: Any, visits: int, *arguments: object) -> None:
    """Call a function of the library whose first argument is the problem.

    Args:
        name: the function.
        problem: its first argument.
        tensors: those whose addresses it receives; they are kept alive until it returns.
        visits: how often it visits each entry of the cost, to estimate its time.
        arguments: its other arguments.
    """
    batch = len(problem.epsilon)
    # The library finds the largest sizes of packed problems itself.
    n, m = (0, 0) if problem.packed else (problem.log_a.shape[1], problem.log_b.shape[1])
    struct = structs.problem_struct(problem, n, m, torch.get_num_threads())
    function = getattr(structs.with_argument_types(library.load_cpu().require()), name)
    work = (visits + struct.dim / 8) * struct.total_a * struct.total_b / max(batch, 1)
    if work > LONG and threading.current_thread() is threading.main_thread():
        status = _interruptible(function, struct, arguments, (problem, tensors))
    else:
        status = function(ctypes.byref(struct), *arguments)
    if status == 0:
        return
    if status == INVALID_OFFSETS:
        for offsets, side in ((problem.cu_a, "a"), (problem.cu_b, "b")):
            size = struct.total_a if side == "a" else struct.total_b
            _check_offsets(f"cu_seqlens_{side}", offsets, size)
    sizes = f"batch={batch}, n={n}, m={m}"
    if problem.packed:
        sizes = f"batch={batch}, {struct.total_a} rows, {struct.total_b} columns"
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"no memory for the workspace of the CPU Sinkhorn ({sizes})")
    raise ValueError(f"the CPU Sinkhorn refused its arguments ({sizes})")


def _interruptible(
    function: Any, struct: structs.ProblemStruct, arguments: tuple[object, ...], keep: object
) -> int:
    """Call a function of the library in another thread, and end it early on Ctrl-C.

    Python handles signals in the main thread, between two of its own instructions. ``keep`` holds
    what the function reads and writes: a second Ctrl-C abandons the thread.
    """
    cancelled = ctypes.c_int32(0)
    struct.cancelled = ctypes.addressof(cancelled)
    result: Future[int] = Future()

    def work(keep: object = (cancelled, keep)) -> None:
        try:
            result.set_result(function(ctypes.byref(struct), *arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name="optical", daemon=True).start()
    try:
        return result.result()
    except BaseException:
        cancelled.value = 1
        result.exception()
        raise


def _check_offsets(name: str, offsets: Tensor | None, size: int) -> None:
    """Raise a ValueError for offsets that do not rise from 0 to ``size``."""
    values = [] if offsets is None else offsets.tolist()
    for i, value in enumerate(values):
        before = values[i - 1] if i else 0
        if i == 0 and value != 0:
            raise ValueError(f"{name}[0] is {value}; expected 0")
        if value < before:
            raise ValueError(f"{name}[{i}] is {value}; expected {before} or more, its predecessor")
        if value > size or (i == len(values) - 1 and value != size):
            expected = f"{size}, the number of vectors" if i == len(values) - 1 else f"<= {size}"
            raise ValueError(f"{name}[{i}] is {value}; expected {expected}")
