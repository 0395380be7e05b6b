"""CPU backend: passes tensors to the compiled library of ``csrc/cpu``."""

from __future__ import annotations

import ctypes
import functools
import operator
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


def forward(problem: Problem, values_only: bool = False) -> Solution:
    """Solve a batch of problems whose tensors are on the CPU.

    With ``values_only``, what only describes the run is left out; see ``Solution.allocate``.

    Allocates the outputs and a workspace of one problem per thread, and no (B, n, m) tensor if the
    cost is computed from vectors.
    """
    problem = _prepare(problem)
    solution = Solution.allocate(problem, values_only)
    pointers = structs.SolutionStruct(*map(structs.address, _SOLUTION_OF_STRUCT(solution)))
    _call("optical_sinkhorn_forward", problem, solution, problem.max_iter, ctypes.byref(pointers))
    return solution


def backward(
    grad_value: Tensor | None,
    grad_value_linear: Tensor | None,
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
    need_masses: bool = True,
) -> Gradients:
    """Compute the gradients that ``problem.gradient`` names; f to n_iter are of its solution.

    An upstream gradient of None is 0. Without ``need_masses``, the gradients of the log-masses are
    None.
    """
    problem = _prepare(problem)
    x, y, dtype = problem.x, problem.y, problem.epsilon.dtype
    grad_x = _empty(x, dtype) if need_x else None
    grad_y = _empty(y, dtype) if need_y and y is not None else None
    grad_log_a = grad_log_b = None
    if need_masses:
        grad_log_a, grad_log_b = torch.empty_like(problem.log_a), torch.empty_like(problem.log_b)
    floating = (grad_value, grad_value_linear, grad_f, grad_g, f, g, w, z)
    _check(dtype, *floating)
    inputs = [_contiguous(x) for x in (*floating, n_iter)]
    tensors = (*inputs, grad_x, grad_y, grad_log_a, grad_log_b)
    pointers = structs.GradientStruct(*map(structs.address, tensors))
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
    fill = _function(library.load_cpu(), "optical_equal_masses")
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
    x, y, dtype = problem.x, problem.y, problem.epsilon.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"epsilon is {dtype}; expected torch.float32 or torch.float64")
    if y is None:
        _check(dtype, x)
        x = x.resolve_neg()
    else:
        x, y = _adjacent("x", x), _adjacent("y", y)
    _check(dtype, problem.log_a, problem.log_b, problem.f0, problem.g0)
    if problem.cu_a is not None and problem.cu_b is not None:
        problem = problem._replace(
            cu_a=problem.cu_a.to(torch.int64), cu_b=problem.cu_b.to(torch.int64)
        )
    fields: tuple[Any, ...] = tuple(problem)
    tensors = problem.cu_a, problem.cu_b, *fields[_MASSES]
    for tensor in tensors:
        if tensor is not None and (tensor.is_neg() or not tensor.is_contiguous()):
            break
    else:
        if x is problem.x and y is problem.y:
            return problem
    cu_a, cu_b, log_a, log_b, epsilon, f0, g0 = map(_contiguous, tensors)
    return problem._replace(
        x=x, y=y, cu_a=cu_a, cu_b=cu_b, log_a=log_a, log_b=log_b, epsilon=epsilon, f0=f0, g0=g0
    )


_MASSES = slice(Problem._fields.index("log_a"), Problem._fields.index("g0") + 1)
_SOLUTION_OF_STRUCT = operator.attrgetter(*(name for name, _ in structs.SolutionStruct._fields_))


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.dtype is dtype and like.is_contiguous():
        return torch.empty_like(like)
    return torch.empty(like.shape, dtype=dtype)


def _contiguous(tensor: Any) -> Any:
    return None if tensor is None else tensor.resolve_neg().contiguous()


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
        if tensor is not None and (tensor.dtype is not dtype or not tensor.is_cpu):
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
    function = _function(library.load_cpu(), name)
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


@functools.cache
def _function(loaded: library.Loaded, name: str) -> Any:
    return getattr(structs.with_argument_types(loaded.require()), name)


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
