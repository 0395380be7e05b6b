"""Any problem as padded ones with a given cost, for implementations that know nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optical.backends import reference
from optical.backends.problem import Gradients, Problem, Solution


class PaddedProblem:
    """Problems padded and with their cost built, and the way back.

    Reading the longest length of packed problems waits for their device.
    """

    def __init__(self, arguments: Problem) -> None:
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
    def given(self) -> Problem:
        """The padded problems with their cost."""
        p = self.padded
        if p.y is None:
            return p
        cost = cost_matrix(p.x, p.y, p.log_a, p.log_b, p.kind)
        return p._replace(x=cost, y=None, kind="given")

    def forward(self, solve: Callable[[Problem], Solution]) -> Solution:
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
        """The arguments of ``optical.backends.reference.backward`` but for the bundle."""
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
            grad_x, grad_y = cost_backward(
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


def cost_matrix(x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor, kind: str) -> Tensor:
    """The costs (B, n, m) of x (B, n, d) and y (B, m, d), in the dtype of the log-masses."""
    x, y = _read(x, log_a), _read(y, log_b)
    if kind == "cosine":
        cost = 1 - _unit(x)[0] @ _unit(y)[0].mT
    elif kind == "sqeuclidean":
        x, y = _centred(x, y, log_a, log_b)
        cost = (x * x).sum(2)[:, :, None] + (y * y).sum(2)[:, None, :] - 2 * (x @ y.mT)
        cost = cost.clamp(min=0)
    else:
        cost = -(x @ y.mT)
    return torch.where(cost.isfinite(), cost, math.nan)


def cost_backward(
    grad_cost: Tensor,
    x: Tensor,
    y: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    kind: str,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and y, each in its own dtype, and None for one that is not needed.

    grad_cost (B, n, m) is exactly 0 at absent pairs, and so is the gradient of an absent token.
    """
    rows, columns = _read(x, log_a), _read(y, log_b)
    if kind == "sqeuclidean":
        rows, columns = _centred(rows, columns, log_a, log_b)
    grad_x = grad_y = None
    if need_x:
        grad_x = _cost_gradient(grad_cost, rows, columns, kind)
        grad_x = torch.where(_present(log_a), grad_x, 0.0).to(x.dtype)
    if need_y:
        grad_y = _cost_gradient(grad_cost.mT, columns, rows, kind)
        grad_y = torch.where(_present(log_b), grad_y, 0.0).to(y.dtype)
    return grad_x, grad_y


def _cost_gradient(grad_cost: Tensor, x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "dot":
        return -(grad_cost @ y)
    if kind == "sqeuclidean":
        return 2 * (x * grad_cost.sum(2, keepdim=True) - grad_cost @ y)
    (x, length, peak), y = _unit(x), _unit(y)[0]
    pulled = grad_cost @ y
    # The part along x changes nothing; |x| is length * peak, which alone might underflow.
    return ((pulled * x).sum(2, keepdim=True) * x - pulled) / length / peak


def _present(log_mass: Tensor) -> Tensor:
    return (log_mass != -math.inf)[:, :, None]


def _read(vectors: Tensor, log_mass: Tensor) -> Tensor:
    return torch.where(_present(log_mass), vectors, 0.0).to(log_mass.dtype)


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x / |x| (0 for the zero vector), and |x| as two factors whose squares cannot overflow."""
    peak = x.abs().amax(2, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    x = x / peak
    square = (x * x).sum(2, keepdim=True)
    # Divided by infinity, the zero vector stays zero and so does whatever pulls at it.
    length = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), math.inf)
    return x / length, length, peak


def _centred(x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds around their common mean: far from the origin, squares would cancel."""
    count = (log_a != -math.inf).sum(1) + (log_b != -math.inf).sum(1)
    centre = (x.sum(1) + y.sum(1)) / count.clamp(min=1)[:, None]
    return x - centre[:, None], y - centre[:, None]
