"""Calls of the public functions as data: run, described, rounded to another dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import optical
from optical.ot.result import SinkhornResult

KERNELS = ("cuda", "triton")
OUTPUTS = ("value", "value_linear", "f", "g", "marginal_error", "n_iter", "status")


@dataclass
class Call:
    """A public function and its arguments.

    Attributes:
        function: name of the function in ``optical``.
        arguments: keyword arguments; the tensors to differentiate require a gradient.
        wrong: name of the argument that was made invalid; empty for a valid call.
        cotangents: upstream gradients of the outputs, by name.
        vectors: operands of the plan and of its transpose, or None.
        threads: number of PyTorch threads, which the library respects.
        scale, mass, slope: magnitudes of the costs, of the masses and of the derivative of the
            costs. Errors are measured relative to them.
        dtype: dtype of the computation.
        device: device of the call. The tensors stay on the CPU, where the reference runs.
    """

    function: str
    arguments: dict[str, Any]
    wrong: str = ""
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    vectors: tuple[Tensor, Tensor] | None = None
    threads: int = 1
    scale: float = 1.0
    mass: float = 1.0
    slope: float = 1.0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={_describe(x)}" for name, x in self.arguments.items())
        return f"optical.{self.function}({arguments})  # {self.threads} threads"

    def option(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def but(self, **changes: Any) -> Call:
        """The same call with some arguments replaced."""
        return replace(self, arguments=self.arguments | changes)

    @property
    def batch(self) -> int:
        return len(self.cotangents["value"])

    @property
    def on_kernels(self) -> bool:
        """Whether the backend is a GPU kernel."""
        return self.option("backend") in KERNELS

    @property
    def in_half_precision(self) -> bool:
        """Whether kernels may store the plan in half precision."""
        plain = self.option("rho") is None and self.option("omega", 1) == 1
        return plain and self.option("precision") == "fast" and self.on_kernels

    def temperature(self, problem: int) -> float:
        epsilon = self.arguments["epsilon"]
        return float(epsilon[problem]) if isinstance(epsilon, Tensor) else epsilon

    def run(self) -> Any:
        """Call the function."""
        arguments = self.arguments
        if self.device != "cpu":
            arguments = {name: self.placed(value) for name, value in arguments.items()}
        return getattr(optical, self.function)(**arguments)

    def placed(self, value: Any) -> Any:
        """Move a tensor, or the tensors of a tuple, to the device of the call."""
        if isinstance(value, tuple):
            return tuple(map(self.placed, value))
        return value.to(self.device) if isinstance(value, Tensor) else value

    def rounded(self, dtype: torch.dtype | None = None, nudge: int = 0) -> Call:
        """The same call on the reference, its numbers converted to ``dtype`` if given.

        With ``nudge > 0``, a seed, every input moves by up to two units in its last place. The
        change in the outputs is an uncertainty that no implementation can avoid.
        """
        generator = torch.Generator().manual_seed(nudge)

        def convert(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(convert, value))
            if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            moved = value.detach().to(dtype)
            if nudge:
                move = torch.rand(value.shape, generator=generator, dtype=dtype) * 4 - 2
                moved = moved * (1 + torch.finfo(dtype).eps * move)
            return moved.requires_grad_(value.requires_grad)

        # Rounded to the dtype of the call first, in the float64 truth too.
        epsilon = torch.as_tensor(self.arguments["epsilon"], dtype=self.dtype)
        arguments = self.arguments | {"epsilon": epsilon.expand(self.batch)}
        arguments = {
            name: value if "mask" in name else convert(value) for name, value in arguments.items()
        }
        arguments["backend"] = "reference"
        return replace(self, arguments=arguments, vectors=convert(self.vectors), device="cpu")

    def transport_problems(self) -> list[Call]:
        """The problems that the call solves, as calls that return a ``SinkhornResult``."""
        names = {"student": "x", "teacher": "y", "student_mask": "mask_a", "teacher_mask": "mask_b"}
        arguments = {names.get(name, name): value for name, value in self.arguments.items()}
        if self.function == "sinkhorn":
            return [self]
        problems = [replace(self, function="sinkhorn_vectors", arguments=arguments)]
        if self.function != "sinkhorn_divergence":
            return problems
        for side, other in (("a", "b"), ("b", "a")):
            within = {name: x for name, x in arguments.items() if not name.endswith(f"_{other}")}
            within |= {
                f"{name[:-1]}{other}": x for name, x in within.items() if name.endswith(f"_{side}")
            }
            within["x"] = within["y"] = arguments[{"a": "x", "b": "y"}[side]]
            problems.append(replace(self, function="sinkhorn_vectors", arguments=within))
        return problems


def outputs(call: Call) -> dict[str, Tensor]:
    """Run the call; its outputs, gradients and products with the plan, by name."""
    result = call.run()
    results = {"value": result}
    if isinstance(result, SinkhornResult):
        results = {name: getattr(result, name) for name in (*OUTPUTS, "gradient_residual")}
        results["plan"] = result.plan()
    if isinstance(result, SinkhornResult) and call.vectors is not None:
        v, w = (call.placed(x.detach()).requires_grad_() for x in call.vectors)
        results["apply_plan"] = result.apply_plan(v)
        results["apply_plan_transposed"] = result.apply_plan(w, transpose=True)
        product = results["apply_plan"].sum() + 2 * results["apply_plan_transposed"].sum()
        results["grad_v"], results["grad_w"] = torch.autograd.grad(product, (v, w))
    leaves = {k: x for k, x in call.arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    if leaves:
        differentiated = [results[name] for name in call.cotangents]
        upstream = [x.to(results["value"]) for x in call.cotangents.values()]
        gradients = torch.autograd.grad(differentiated, list(leaves.values()), upstream)
        results |= {f"grad_{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach().cpu() for name, x in results.items()}


def reference_outputs(
    call: Call, dtype: torch.dtype | None = None, nudge: int = 0
) -> dict[str, Tensor]:
    """The outputs of the reference for the inputs of ``Call.rounded``."""
    return outputs(call.rounded(dtype, nudge))


def largest(x: Tensor) -> float:
    """The largest magnitude among the finite entries; 0 without any."""
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def differences(x: Tensor, y: Tensor) -> Tensor:
    """Flattened absolute differences: 0 for equal infinities and for two NaN, inf for one NaN."""
    x, y = x.double(), y.double()
    same = (x == y) | (x.isnan() & y.isnan())
    return torch.where(same, 0.0, (x - y).abs().nan_to_num(math.inf, math.inf)).reshape(-1)


def difference(x: Tensor, y: Tensor) -> float:
    """The largest of ``differences``; 0 for empty tensors."""
    return differences(x, y).max().item() if x.numel() else 0.0


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        numbers = "" if value.numel() > 6 else f" {value.tolist()}"
        leaf = " with a gradient" if value.requires_grad else ""
        layout = f"{tuple(value.shape)} {str(value.dtype)[6:]} strides {value.stride()}"
        return f"<{layout}{numbers}{leaf}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe, value))})"
    return repr(value)
