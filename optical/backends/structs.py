"""ctypes structures of ``csrc/sinkhorn.h`` and their contents, for the CPU and CUDA libraries."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from optical.backends.problem import Problem

# The enumerations of sinkhorn.h.
KIND_CODES = {"given": 0, "cosine": 1, "sqeuclidean": 2, "dot": 3}
GRADIENT_CODES = {"envelope": 0, "implicit": 1, "unroll": 2}
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Of masks and lengths.
MASK_CODES = DTYPE_CODES | {
    torch.bool: 4,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}


def _fields(ctype: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, ctype) for name in names.split()]


class ProblemStruct(ctypes.Structure):
    """``optical_problem`` of sinkhorn.h."""

    _fields_ = [
        *_fields(ctypes.c_int64, "batch n m dim"),
        *_fields(ctypes.c_int32, "kind precision"),
        *_fields(ctypes.c_void_p, "x y"),
        *_fields(ctypes.c_int32, "x_type y_type"),
        *_fields(ctypes.c_int64, "x_stride_batch x_stride_row x_stride_entry"),
        *_fields(ctypes.c_int64, "y_stride_batch y_stride_column"),
        *_fields(ctypes.c_void_p, "offset_a offset_b log_a log_b epsilon init_f init_g"),
        *_fields(ctypes.c_int32, "max_iter"),
        *_fields(ctypes.c_double, "tol rho_a rho_b omega"),
        *_fields(ctypes.c_int32, "anderson"),
        *_fields(ctypes.c_double, "anneal_start anneal_ratio"),
        *_fields(ctypes.c_int32, "gradient low_memory num_threads fast"),
        *_fields(ctypes.c_int64, "total_a total_b"),
        *_fields(ctypes.c_void_p, "cancelled"),
    ]


class SolutionStruct(ctypes.Structure):
    """``optical_solution`` of sinkhorn.h."""

    _fields_ = _fields(
        ctypes.c_void_p, "value value_linear marginal_error f g n_iter status w z residual"
    )


class GradientStruct(ctypes.Structure):
    """``optical_gradient`` of sinkhorn.h."""

    _fields_ = _fields(
        ctypes.c_void_p,
        "grad_value grad_value_linear grad_f grad_g f g w z n_iter"
        " grad_x grad_y grad_log_a grad_log_b",
    )


def problem_struct(problem: Problem, n: int, m: int, num_threads: int = 1) -> ProblemStruct:
    """Describe a batch of problems to a library by the addresses and strides of its tensors.

    The caller keeps ``problem`` alive until the library returns.

    Args:
        problem: a given cost may have any strides, and vectors any strides except in the last
            dimension, whose entries are adjacent. All other tensors are contiguous.
        n, m: upper bounds of the number of rows and columns of a problem; for packed problems, the
            CPU library finds them itself.
        num_threads: threads of the CPU library; unused by CUDA.
    """
    x, y, epsilon, log_a, log_b = (
        problem.x,
        problem.y,
        problem.epsilon,
        problem.log_a,
        problem.log_b,
    )
    struct = ProblemStruct.from_buffer_copy(_options_struct(problem[_OPTIONS]))
    struct.batch, struct.n, struct.m = epsilon.shape[0], n, m
    struct.kind, struct.precision = KIND_CODES[problem.kind], DTYPE_CODES[epsilon.dtype]
    struct.x, struct.x_type = x.data_ptr(), DTYPE_CODES[x.dtype]
    *strides, struct.x_stride_row, struct.x_stride_entry = x.stride()
    if strides:
        struct.x_stride_batch = strides[0]
    if y is not None:
        struct.dim, struct.y, struct.y_type = x.shape[-1], y.data_ptr(), DTYPE_CODES[y.dtype]
        *strides, struct.y_stride_column, _ = y.stride()
        if strides:
            struct.y_stride_batch = strides[0]
    struct.log_a, struct.log_b = log_a.data_ptr(), log_b.data_ptr()
    struct.epsilon = epsilon.data_ptr()
    struct.offset_a, struct.offset_b = address(problem.cu_a), address(problem.cu_b)
    struct.init_f, struct.init_g = address(problem.f0), address(problem.g0)
    struct.num_threads = num_threads
    struct.total_a, struct.total_b = log_a.numel(), log_b.numel()
    return struct


_OPTIONS = slice(Problem._fields.index("max_iter"), Problem._fields.index("backend") + 1)


@functools.lru_cache(maxsize=256)
def _options_struct(options: tuple[Any, ...]) -> ProblemStruct:
    """A structure with the options of a problem only; setting 13 fields costs microseconds."""
    named = dict(zip(Problem._fields[_OPTIONS], options, strict=True))
    del named["backend"]
    named["gradient"] = GRADIENT_CODES[named["gradient"]]
    named["fast"] = named.pop("precision") == "fast"
    return ProblemStruct(**named)


Addresses = TypeVar("Addresses", SolutionStruct, GradientStruct)


def address_struct(struct: type[Addresses], tensors: Mapping[str, Tensor | None]) -> Addresses:
    """Fill a structure of pointers with the addresses of contiguous tensors, by field name."""
    return struct(**{name: address(tensor) for name, tensor in tensors.items()})


def address(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first element, or None for the null pointer."""
    return None if tensor is None else tensor.data_ptr()


_POINTER, _PROBLEM = ctypes.c_void_p, ctypes.POINTER(ProblemStruct)
_SOLUTION, _GRADIENT = ctypes.POINTER(SolutionStruct), ctypes.POINTER(GradientStruct)
ARGUMENT_TYPES: dict[str, list[Any]] = {
    "optical_sinkhorn_forward": [_PROBLEM, _SOLUTION],
    "optical_sinkhorn_backward": [_PROBLEM, _GRADIENT],
    "optical_apply_plan": [
        *(_PROBLEM, _POINTER, _POINTER, _POINTER, ctypes.c_int64, ctypes.c_int32, _POINTER)
    ],
    "optical_plan": [_PROBLEM, _POINTER, _POINTER, ctypes.c_int32, _POINTER],
    "optical_equal_masses": [
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int32),
        *(_POINTER, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64),
        *(_POINTER, ctypes.c_int32, ctypes.c_int64, _POINTER),
    ],
    "optical_cuda_error": [],
    "optical_cuda_probe": [ctypes.POINTER(ctypes.c_int)],
    "optical_cuda_reach": [_PROBLEM],
    "optical_cuda_forward": [_PROBLEM, _SOLUTION, _POINTER],
    "optical_cuda_backward": [_PROBLEM, _GRADIENT, _POINTER, _POINTER],
    "optical_doubly_stochastic": [
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32),
        *(ctypes.c_double, ctypes.c_int32, _POINTER, _POINTER, _POINTER),
    ],
}


@functools.cache
def with_argument_types(library: Any) -> Any:
    """Declare the types of a library's functions, once, and return the library.

    ``nvrtc.Kernels``, which is no ctypes library, is returned unchanged.
    """
    if isinstance(library, ctypes.CDLL):
        for name, types in ARGUMENT_TYPES.items():
            if hasattr(library, name):
                getattr(library, name).argtypes = types
        if hasattr(library, "optical_cuda_error"):
            library.optical_cuda_error.restype = ctypes.c_char_p
    return library
