"""The CPU backend: tensors for the compiled library of ``optical.native``, and back."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from optical import native
from optical.arguments import Arguments, Gradients, Outputs


def forward(arguments: Arguments) -> Outputs:
    """Solve a batch of problems; see ``optical.arguments`` for what goes in and comes out.

    All tensors are on the CPU. Nothing is allocated but the outputs and the memory of one problem
    per thread: no (batch, n, m) tensor where the cost comes from vectors.
    """
    call = _Call(arguments)
    outputs = Outputs.empty(call.lines_a, call.lines_b, call.epsilon, arguments.gradient)
    solution = native._Solution(**{name: _address(x) for name, x in outputs._asdict().items()})
    call.run("optical_sinkhorn_forward", solution)
    return outputs


def backward(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    arguments: Arguments,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    z: Tensor,
    n_iter: Tensor,
    need_x: bool,
    need_y: bool,
) -> Gradients:
    """Gradients with respect to x, y (None where not needed), log_a and log_b, by the mode of
    ``arguments.gradient``; the other tensors are outputs of ``forward``."""
    call = _Call(arguments)
    dtype = call.epsilon.dtype
    x, y = arguments.x, arguments.y
    grad_x = torch.empty(x.shape, dtype=dtype) if need_x else None
    grad_y = torch.empty(y.shape, dtype=dtype) if need_y and y is not None else None
    grad_log_a, grad_log_b = torch.empty_like(call.lines_a), torch.empty_like(call.lines_b)
    upstream = {
        "grad_value": grad_value,
        "grad_value_linear": grad_value_linear,
        "grad_f": grad_f,
        "grad_g": grad_g,
        "f": f,
        "g": g,
        "w": w,
        "z": z,
        "n_iter": n_iter,
    }
    given = {name: None if t is None else t.contiguous() for name, t in upstream.items()}
    call.check(*(t for name, t in given.items() if name != "n_iter"))
    made = {"grad_x": grad_x, "grad_y": grad_y, "grad_log_a": grad_log_a, "grad_log_b": grad_log_b}
    gradient = native._Gradient(**{name: _address(t) for name, t in (given | made).items()})
    call.run("optical_sinkhorn_backward", gradient)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        None if grad_y is None or y is None else grad_y.to(y.dtype),
        grad_log_a,
        grad_log_b,
    )


def apply_plan(arguments: Arguments, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """P v for v by line of side b (or, transposed, P' v for v by line of side a), tile by tile."""
    call = _Call(arguments)
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    call.check(f, g, v)
    lines = call.lines_b if transpose else call.lines_a
    out = v.new_empty(*lines.shape, v.shape[-1])
    pointers = (_address(f), _address(g), _address(v))
    call.run("optical_apply_plan", *pointers, v.shape[-1], int(transpose), _address(out))
    return out


class _Call:
    """Arguments as the library reads them, with the tensors they point into kept alive."""

    def __init__(self, arguments: Arguments) -> None:
        self.lines_a, self.lines_b = arguments.log_a.contiguous(), arguments.log_b.contiguous()
        self.epsilon = arguments.epsilon.contiguous()
        self.dtype = self.epsilon.dtype
        if str(self.dtype) not in ("torch.float32", "torch.float64"):
            raise TypeError(f"epsilon is {self.dtype}; expected torch.float32 or torch.float64")
        x, y, cu_a, cu_b = arguments.x, arguments.y, arguments.cu_a, arguments.cu_b
        if arguments.kind == "given":
            self.check(x)
        else:
            x, y = _adjacent(x), _adjacent(y if y is not None else x)
        starts = [None if t is None else t.contiguous() for t in (arguments.f0, arguments.g0)]
        self.check(self.lines_a, self.lines_b, *starts)
        batch = len(self.epsilon)
        if cu_a is not None and cu_b is not None:
            cu_a, cu_b = (t.to(torch.int64).contiguous() for t in (cu_a, cu_b))
            n, m = (int(t.diff().max()) if batch else 0 for t in (cu_a, cu_b))
            between_x, between_y = 0, 0
        else:
            n, m = self.lines_a.shape[1], self.lines_b.shape[1]
            between_x, between_y = x.stride(0), 0 if y is None else y.stride(0)
        self.kept = (x, y, cu_a, cu_b, *starts)
        self.problem = native._Problem(
            batch=batch,
            n=n,
            m=m,
            dim=0 if arguments.kind == "given" else x.shape[-1],
            kind=native.KINDS[arguments.kind],
            precision=native.TYPES[str(self.dtype)],
            x=_address(x),
            y=_address(y),
            x_type=_type("x", x),
            y_type=0 if y is None else _type("y", y),
            x_stride_batch=between_x,
            x_stride_row=x.stride(-2),
            x_stride_entry=x.stride(-1),
            y_stride_batch=between_y,
            y_stride_column=0 if y is None else y.stride(-2),
            offset_a=_address(cu_a),
            offset_b=_address(cu_b),
            log_a=_address(self.lines_a),
            log_b=_address(self.lines_b),
            epsilon=_address(self.epsilon),
            init_f=_address(starts[0]),
            init_g=_address(starts[1]),
            max_iter=arguments.max_iter,
            tol=arguments.tol,
            rho_a=arguments.rho_a,
            rho_b=arguments.rho_b,
            omega=arguments.omega,
            anderson=arguments.anderson,
            anneal_start=arguments.anneal_start,
            anneal_ratio=arguments.anneal_ratio,
            gradient=native.GRADIENTS[arguments.gradient],
            low_memory=arguments.low_memory,
            num_threads=torch.get_num_threads(),
        )

    def check(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and (tensor.device.type != "cpu" or tensor.dtype != self.dtype):
                found = f"{tensor.dtype} on {tensor.device}"
                raise TypeError(f"a tensor is {found}; expected {self.dtype} on cpu, like epsilon")

    def run(self, name: str, *others: Any) -> None:
        structures = [
            ctypes.byref(other) if isinstance(other, ctypes.Structure) else other
            for other in (self.problem, *others)
        ]
        status = getattr(native.opened(), name)(*structures)
        sizes = f"batch={self.problem.batch}, n={self.problem.n}, m={self.problem.m}"
        if status == 2:
            raise MemoryError(f"no memory for the workspace of the CPU Sinkhorn ({sizes})")
        if status != 0:
            raise ValueError(f"the CPU Sinkhorn refused its arguments ({sizes})")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _adjacent(vectors: Tensor) -> Tensor:
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


def _type(name: str, tensor: Tensor) -> int:
    if tensor.device.type != "cpu" or str(tensor.dtype) not in native.TYPES:
        found = f"{tensor.dtype} on {tensor.device}"
        raise TypeError(f"{name} is {found}; expected {', '.join(native.TYPES)} on cpu")
    return native.TYPES[str(tensor.dtype)]
