"""Backward pass of the operator: gradients of a finished run, its plan, and products with it.

Kernels are launched without synchronising with the device.
"""

import functools
import math

import torch
from torch import Tensor

from optical.backends.problem import Problem
from optical.kernels import tuning
from optical.kernels.backward_unrolled import Upstream, unroll
from optical.kernels.batch import (
    LaunchProblem,
    Layout,
    ceil_div,
    cost_options,
    next_power_of_2,
)
from optical.kernels.gradients import cost_gradient_kernel, vector_gradient_kernel
from optical.kernels.launch import KeptLaunch, launch_kernel
from optical.kernels.plan_products import mass_gradient_kernel, plan_kernel, product_kernel
from optical.kernels.tokens.norms import Norms


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
    need_x: bool = True,
    need_y: bool = False,
    need_masses: bool = True,
    kept: list[Norms] | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of a run, as the ``backward`` of every backend does.

    For token vectors these are the gradients of the vectors; the cost is not materialised.
    Gradients that are not needed are None. ``kept`` is what ``forward`` kept, if it ran.
    """
    with torch.cuda.device_of(problem.x):
        launch = LaunchProblem(problem, *(kept or ()))
        if problem.gradient == "unroll":
            upstream = Upstream(grad_value, grad_value_linear, grad_f, grad_g)
            grad_x, grad_y, *masses = unroll(launch, upstream, f, n_iter, need_x, need_y)
            return grad_x, grad_y, *(masses if need_masses else (None, None))
        implicit = problem.gradient == "implicit"
        if not implicit:
            w, z = f, g
        values = grad_value, grad_value_linear
        rows, columns = (f, g, w, z), (g, f, z, w)
        grad_x = grad_y = grad_log_a = grad_log_b = None
        if problem.y is None and need_x:
            grad_x = _cost_gradient(launch, rows, values, implicit)
        elif problem.y is not None:
            if need_x:
                grad_x = _vector_gradient(launch, problem.x, False, rows, values, implicit)
            if need_y:
                grad_y = _vector_gradient(launch, problem.y, True, columns, values, implicit)
        if need_masses:
            grad_log_a = _mass_gradient(launch, False, rows[:3], values, implicit)
            grad_log_b = _mass_gradient(launch, True, columns[:3], values, implicit)
    return grad_x, grad_y, grad_log_a, grad_log_b


def _cost_gradient(
    launch: LaunchProblem,
    potentials: tuple[Tensor, ...],
    upstream: tuple[Tensor, Tensor],
    implicit: bool,
) -> Tensor:
    problem = launch.problem
    grad = torch.empty(problem.x.shape, dtype=problem.x.dtype, device=problem.x.device)
    rows, columns = 32, 64
    grid = (launch.size, ceil_div(launch.n, rows), ceil_div(launch.m, columns))
    launch_kernel(
        cost_gradient_kernel,
        grid,
        problem.x,
        problem.log_a,
        problem.log_b,
        problem.epsilon,
        *potentials,
        *upstream,
        grad,
        *launch.strides,
        launch.n,
        launch.m,
        IMPLICIT=implicit,
        BLOCK_N=rows,
        BLOCK_M=columns,
        num_warps=4,
    )
    return grad


def _vector_gradient(
    launch: LaunchProblem,
    vectors: Tensor,
    swapped: bool,
    potentials: tuple[Tensor, ...],
    upstream: tuple[Tensor, Tensor],
    implicit: bool,
) -> Tensor:
    grad = torch.empty_like(vectors)
    tensors = *launch.pointers(swapped), *potentials, *upstream, grad
    for differentiate in _vector_launches(launch.layout, swapped, vectors.dtype, implicit):
        differentiate(*tensors)
    return grad


@functools.lru_cache(maxsize=4096)
def _vector_launches(
    layout: Layout, swapped: bool, dtype: torch.dtype, implicit: bool
) -> list[KeptLaunch]:
    """The launches that compute the gradient of the vectors of one side, which have ``dtype``."""
    n, m = (layout.m, layout.n) if swapped else (layout.n, layout.m)
    return [
        KeptLaunch(
            vector_gradient_kernel,
            (
                layout.size,
                layout.blocks(n, tile.rows),
                1 if tile.whole else ceil_div(layout.dim, tile.entries),
            ),
            *layout.sizes(swapped),
            *(least, most),
            IMPLICIT=implicit,
            WHOLE=tile.whole,
            BLOCK_N=tile.rows,
            BLOCK_M=tile.columns,
            BLOCK_D=tile.depth,
            BLOCK_G=tile.entries,
            **layout.gradient_dot(dtype),
            **cost_options(layout),
            num_warps=layout.warps(tile.warps),
            num_stages=tile.stages,
        )
        for tile, least, most in tuning.gradient_tiles(m, layout.packed, layout.single)
    ]


def _mass_gradient(
    launch: LaunchProblem,
    swapped: bool,
    potentials: tuple[Tensor, ...],
    upstream: tuple[Tensor, Tensor],
    implicit: bool,
) -> Tensor:
    problem, tile = launch.problem, tuning.PLAN_PRODUCT
    log_mass, rho = (problem.log_b, problem.rho_b) if swapped else (problem.log_a, problem.rho_a)
    grad = torch.empty_like(log_mass)
    launch_kernel(
        mass_gradient_kernel,
        (launch.size, launch.blocks(log_mass.shape[-1], tile.rows)),
        *launch.pointers(swapped),
        *potentials,
        *upstream,
        grad,
        *launch.sizes(swapped),
        1 / rho,
        IMPLICIT=implicit,
        READ_COST=implicit or (rho < math.inf and problem.y is None),
        BLOCK_N=tile.rows,
        BLOCK_M=tile.columns,
        BLOCK_D=tile.depth,
        **cost_options(launch),
        num_warps=launch.warps(tile.warps),
        num_stages=tile.stages,
    )
    return grad


def apply_plan(problem: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """Multiply the plan of potentials f and g, or its transpose, with v (..., width)."""
    tile = tuning.PLAN_PRODUCT
    with torch.cuda.device_of(problem.x):
        launch = LaunchProblem(problem)
        width, log_mass = v.shape[-1], problem.log_b if transpose else problem.log_a
        product = v.new_empty(*log_mass.shape, width)
        if not product.numel():
            return product
        part = min(64, max(16, next_power_of_2(width)))
        blocks = launch.blocks(log_mass.shape[-1], tile.rows)
        launch_kernel(
            product_kernel,
            (launch.size, blocks, ceil_div(width, part)),
            *launch.pointers(transpose),
            *((g, f) if transpose else (f, g)),
            v,
            product,
            *launch.sizes(transpose),
            width,
            DOT_PRECISION=launch.exact,
            BLOCK_N=tile.rows,
            BLOCK_M=tile.columns,
            BLOCK_D=tile.depth,
            BLOCK_G=part,
            **cost_options(launch),
            num_warps=launch.warps(tile.warps),
            num_stages=tile.stages,
        )
    return product


def plan(problem: Problem, f: Tensor, g: Tensor, log: bool) -> Tensor:
    """Return the plan (B, n, m) of padded problems, or with ``log`` its logarithm.

    Padding and forbidden pairs are exactly 0 (-inf); malformed problems are NaN where valid.
    """
    tile = tuning.PLAN
    with torch.cuda.device_of(problem.x):
        launch = LaunchProblem(problem)
        out = f.new_empty(launch.size, launch.n, launch.m)
        if not out.numel():
            return out
        grid = launch.size, ceil_div(launch.n, tile.rows), ceil_div(launch.m, tile.columns)
        launch_kernel(
            plan_kernel,
            grid,
            *launch.pointers(),
            f,
            g,
            out,
            *launch.sizes(),
            LOG=log,
            BLOCK_N=tile.rows,
            BLOCK_M=tile.columns,
            BLOCK_D=tile.depth,
            **cost_options(launch),
            num_warps=launch.warps(tile.warps),
            num_stages=tile.stages,
        )
    return out
