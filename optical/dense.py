"""Any problem as padded ones with a given cost, for implementations that know nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optical import costs, reference
from optical.arguments import Arguments, Gradients, Outputs


class Dense:
    """Problems padded and with their cost built, and the way back.

    Reading the longest length of packed problems waits for their device.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.original = arguments
        self.a = Side(arguments.cu_a)
        self.b = Side(arguments.cu_b)
        self.padded = arguments._replace(
            x=self.a.pad(arguments.x) if arguments.y is not None else arguments.x,
            y=None if arguments.y is None else self.b.pad(arguments.y),
            cu_a=None,
            cu_b=None,
            log_a=self.a.pad(arguments.log_a, -math.inf),
            log_b=self.b.pad(arguments.log_b, -math.inf),
            f0=None if arguments.f0 is None else self.a.pad(arguments.f0),
            g0=None if arguments.g0 is None else self.b.pad(arguments.g0),
        )

    @property
    def given(self) -> Arguments:
        """The padded problems with their cost."""
        p = self.padded
        if p.y is None:
            return p
        cost = costs.matrix(p.x, p.y, p.log_a, p.log_b, p.kind)
        return p._replace(x=cost, y=None, kind="given")

    def forward(self, solve: Callable[[Arguments], Outputs]) -> Outputs:
        outputs = solve(self.given)
        outputs = outputs._replace(f=self.a.pack(outputs.f), g=self.b.pack(outputs.g))
        if self.original.gradient != "implicit":
            return outputs
        return outputs._replace(w=self.a.pack(outputs.w), z=self.b.pack(outputs.z))

    def backward(
        self,
        differentiate: Callable[..., Gradients],
        *upstream_and_outputs: Any,
    ) -> Gradients:
        """The arguments of ``optical.reference.backward`` but for the bundle."""
        *upstream, f, g, w, z, n_iter, need_x, need_y = upstream_and_outputs
        grad_value, grad_value_linear, grad_f, grad_g = upstream
        p = self.padded
        implicit = p.gradient == "implicit"
        grad_cost, _, grad_log_a, grad_log_b = differentiate(
            grad_value,
            grad_value_linear,
            None if grad_f is None else self.a.pad(grad_f),
            None if grad_g is None else self.b.pad(grad_g),
            self.given,
            self.a.pad(f),
            self.b.pad(g),
            self.a.pad(w) if implicit else w,
            self.b.pad(z) if implicit else z,
            n_iter,
            need_x or need_y,
            False,
        )
        grad_x, grad_y = grad_cost, None
        if p.y is not None and grad_cost is not None:
            grad_x, grad_y = costs.backward(
                grad_cost, p.x, p.y, p.log_a, p.log_b, p.kind, need_x, need_y
            )
        grad_x = None if grad_x is None else self.a.pack(grad_x)
        grad_y = None if grad_y is None else self.b.pack(grad_y)
        return grad_x, grad_y, self.a.pack(grad_log_a), self.b.pack(grad_log_b)

    def apply_plan(
        self, apply: Callable[..., Tensor], f: Tensor, g: Tensor, v: Tensor, transpose: bool
    ) -> Tensor:
        read, written = (self.a, self.b) if transpose else (self.b, self.a)
        return written.pack(apply(self.given, self.a.pad(f), self.b.pad(g), read.pad(v), transpose))

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        """The coupling (B, n, m), 0 in the padding; differentiable by autograd.

        Computed in float64: what float32 would lose in the exponents is more than the potentials
        have lost.
        """
        p = self.given
        factors = (p.x, p.log_a, p.log_b, p.epsilon, self.a.pad(f), self.b.pad(g))
        return reference.plan(*(x.double() for x in factors)).to(f.dtype)


class Side:
    """The rows or the columns of a batch; without offsets (B + 1,) they are padded already."""

    def __init__(self, offsets: Tensor | None) -> None:
        self.inside = self.index = None
        if offsets is not None:
            lengths = offsets.diff()
            size = int(lengths.max()) if len(lengths) else 0
            place = torch.arange(size, device=offsets.device)
            self.inside = place < lengths[:, None]
            self.index = (offsets[:-1, None] + place) * self.inside

    def pad(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(N, ...) as (B, longest, ...), ``fill`` behind the end of each problem."""
        if self.index is None or self.inside is None:
            return packed
        inside = self.inside.view(*self.inside.shape, *[1] * (packed.dim() - 1))
        return torch.where(inside, packed[self.index], fill)

    def pack(self, padded: Tensor) -> Tensor:
        return padded if self.inside is None else padded[self.inside]
