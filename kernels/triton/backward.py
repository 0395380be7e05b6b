"""From a solution to its gradients and to products with its plan; nothing waits for the device."""

import math

import torch
from torch import Tensor

import triton
from optical.arguments import Arguments, Gradients
from optical.kernels import tuning
from optical.kernels.backward_unrolled import Arriving, unroll
from optical.kernels.batch import Batch
from optical.kernels.gradients import cost_gradient_kernel, vector_gradient_kernel
from optical.kernels.plan_products import mass_gradient_kernel, product_kernel


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
    need_x: bool = True,
    need_y: bool = False,
) -> Gradients:
    """As ``optical.reference.backward``, to the vectors where there are some."""
    p = arguments
    with torch.cuda.device_of(p.x):
        batch = Batch(arguments)
        if p.gradient == "unroll":
            arriving = Arriving(grad_value, grad_value_linear, grad_f, grad_g)
            return unroll(batch, arriving, f, n_iter, need_x, need_y)
        implicit = p.gradient == "implicit"
        if not implicit:
            w, z = f, g
        upstream = grad_value, grad_value_linear
        grad_x = grad_y = None
        if p.y is None and need_x:
            grad_x = _cost_gradient(batch, f, g, w, z, upstream, implicit)
        elif p.y is not None:
            if need_x:
                grad_x = _vector_gradient(batch, p.x, False, (f, g, w, z), upstream, implicit)
            if need_y:
                grad_y = _vector_gradient(batch, p.y, True, (g, f, z, w), upstream, implicit)
        grad_log_a = _mass_gradient(batch, p.log_a, False, (f, g, w), upstream, p.rho_a, implicit)
        grad_log_b = _mass_gradient(batch, p.log_b, True, (g, f, z), upstream, p.rho_b, implicit)
    return grad_x, grad_y, grad_log_a, grad_log_b


def _cost_gradient(
    batch: Batch,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    z: Tensor,
    upstream: tuple[Tensor, Tensor],
    implicit: bool,
) -> Tensor:
    p = batch.arguments
    grad = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    rows, columns = 32, 64
    grid = (batch.size, triton.cdiv(batch.n, rows), triton.cdiv(batch.m, columns))
    cost_gradient_kernel[grid](
        p.x,
        p.log_a,
        p.log_b,
        p.epsilon,
        f,
        g,
        w,
        z,
        *upstream,
        grad,
        *batch.strides,
        batch.n,
        batch.m,
        IMPLICIT=implicit,
        BLOCK_N=rows,
        BLOCK_M=columns,
        num_warps=4,
    )
    return grad


def _vector_gradient(
    batch: Batch,
    vectors: Tensor,
    swapped: bool,
    potentials: tuple[Tensor, ...],
    upstream: tuple[Tensor, Tensor],
    implicit: bool,
) -> Tensor:
    grad = torch.empty_like(vectors)
    own, other = (batch.m, batch.n) if swapped else (batch.n, batch.m)
    for tile, least, most in tuning.gradient_tiles(other, batch.packed, batch.single):
        parts = 1 if tile.whole else triton.cdiv(batch.dim, tile.pull)
        vector_gradient_kernel[(batch.size, batch.blocks(own, tile.rows), parts)](
            *batch.sources(swapped),
            *potentials,
            *upstream,
            grad,
            *batch.sizes(swapped),
            least,
            most,
            KIND=batch.kind,
            PACKED=batch.packed,
            IMPLICIT=implicit,
            WHOLE=tile.whole,
            SCALED=batch.scaled,
            WIDE=batch.wide,
            PRECISION=batch.precision,
            PULL=batch.pull,
            PULL_PRECISION=batch.pull_precision,
            BLOCK_N=tile.rows,
            BLOCK_M=tile.columns,
            BLOCK_D=tile.depth,
            BLOCK_G=tile.pull,
            num_warps=batch.warps(tile.warps),
            num_stages=tile.stages,
        )
    return grad


def _mass_gradient(
    batch: Batch,
    log_mass: Tensor,
    swapped: bool,
    potentials: tuple[Tensor, ...],
    upstream: tuple[Tensor, Tensor],
    rho: float,
    implicit: bool,
) -> Tensor:
    grad, tile = torch.empty_like(log_mass), tuning.WALK
    walk = implicit or (rho < math.inf and batch.arguments.y is None)
    mass_gradient_kernel[(batch.size, batch.blocks(log_mass.shape[-1], tile.rows))](
        *batch.sources(swapped),
        *potentials,
        *upstream,
        grad,
        *batch.sizes(swapped),
        1 / rho,
        KIND=batch.kind,
        PACKED=batch.packed,
        IMPLICIT=implicit,
        WALK=walk,
        SCALED=batch.scaled,
        WIDE=batch.wide,
        PRECISION=batch.precision,
        BLOCK_N=tile.rows,
        BLOCK_M=tile.columns,
        BLOCK_D=tile.depth,
        num_warps=batch.warps(tile.warps),
        num_stages=tile.stages,
    )
    return grad


def apply_plan(arguments: Arguments, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """As ``optical.reference.apply_plan``."""
    p, tile = arguments, tuning.WALK
    with torch.cuda.device_of(p.x):
        batch = Batch(arguments)
        width, lines = v.shape[-1], p.log_b if transpose else p.log_a
        product = v.new_empty(*lines.shape, width)
        if not product.numel():
            return product
        part = min(64, max(16, triton.next_power_of_2(width)))
        blocks = batch.blocks(lines.shape[-1], tile.rows)
        product_kernel[(batch.size, blocks, triton.cdiv(width, part))](
            *batch.sources(transpose),
            *((g, f) if transpose else (f, g)),
            v,
            product,
            *batch.sizes(transpose),
            width,
            KIND=batch.kind,
            PACKED=batch.packed,
            SCALED=batch.scaled,
            WIDE=batch.wide,
            PRECISION=batch.precision,
            PULL=batch.exact,
            BLOCK_N=tile.rows,
            BLOCK_M=tile.columns,
            BLOCK_D=tile.depth,
            BLOCK_G=part,
            num_warps=batch.warps(tile.warps),
            num_stages=tile.stages,
        )
    return product
