"""The cost of a pair of token vectors, and what a gradient of the costs gives the vectors.

    cosine       C = 1 - x.y / (|x| |y|)     and 1 where either vector is zero
    sqeuclidean  C = |x - y|^2
    dot          C = -x.y

Half precision is converted first, exactly, and everything else happens in the computing dtype: a
vector normalised before it is rounded would lose three decimal digits. Vectors of absent tokens are
never read as numbers. A cost that is not finite becomes NaN, never a forbidden pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def matrix(x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor, kind: str) -> Tensor:
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


def backward(
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
        grad_x = _gradient(grad_cost, rows, columns, kind)
        grad_x = torch.where(_present(log_a), grad_x, 0.0).to(x.dtype)
    if need_y:
        grad_y = _gradient(grad_cost.mT, columns, rows, kind)
        grad_y = torch.where(_present(log_b), grad_y, 0.0).to(y.dtype)
    return grad_x, grad_y


def _gradient(grad_cost: Tensor, x: Tensor, y: Tensor, kind: str) -> Tensor:
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
