"""CPU backend: passes tensors to the compiled library of ``csrc/cpu``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from optical.backends import library, structs
from optical.backends.problem import Gradients, Problem, Solution, dtype_name

OUT_OF_MEMORY = 2  # of csrc/sinkhorn.h


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
    _call("optical_sinkhorn_forward", problem, ctypes.byref(pointers))
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
    pointers = structs.address_struct(structs.GradientStruct, inputs | outputs)
    _call("optical_sinkhorn_backward", problem, ctypes.byref(pointers))
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
    _call("optical_apply_plan", problem, *pointers, v.shape[-1], int(transpose), out.data_ptr())
    return out


def _prepare(problem: Problem) -> Problem:
    """Check dtypes and devices, and make contiguous the tensors that the library reads so."""
    x, y, cu_a, cu_b = problem.x, problem.y, problem.cu_a, problem.cu_b
    dtype = problem.epsilon.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"epsilon is {dtype}; expected torch.float32 or torch.float64")
    if y is None:
        _check(dtype, x)
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
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


def _check(dtype: torch.dtype, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and (tensor.dtype != dtype or tensor.device.type != "cpu"):
            found = f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"a tensor is {found}; expected {dtype} on cpu, like epsilon")


def _call(name: str, problem: Problem, *arguments: object) -> None:
    """Call a function of the library whose first argument is the problem."""
    cu_a, cu_b = problem.cu_a, problem.cu_b
    if cu_a is None or cu_b is None:
        n, m = problem.log_a.shape[1], problem.log_b.shape[1]
    else:
        n, m = (int(cu.diff().max()) if len(cu) > 1 else 0 for cu in (cu_a, cu_b))
    struct = structs.problem_struct(problem, n, m, torch.get_num_threads())
    functions = structs.with_argument_types(library.load_cpu().require())
    status = getattr(functions, name)(ctypes.byref(struct), *arguments)
    sizes = f"batch={struct.batch}, n={n}, m={m}"
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"no memory for the workspace of the CPU Sinkhorn ({sizes})")
    if status != 0:
        raise ValueError(f"the CPU Sinkhorn refused its arguments ({sizes})")
