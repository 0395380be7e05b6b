"""Unrolled gradients: the total derivative of a finite run, in registers or streamed.

Kernels are launched without synchronising with the device.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optical.backends.problem import Gradients
from optical.kernels import tuning
from optical.kernels.batch import (
    LaunchProblem,
    ceil_div,
    choose_tiles,
    initial_potentials,
    tile_options,
)
from optical.kernels.launch import launch_kernel
from optical.kernels.onchip.unrolled import annealing_kernel, unrolled_kernel
from optical.kernels.streamed.unrolled_backward import back_kernel, unrolled_gradient_kernel
from optical.kernels.streamed.unrolled_replay import forth_kernel, survey_kernel, weight_kernel


class Upstream(NamedTuple):
    """Gradients of the loss with respect to the outputs of the run.

    Those of the potentials are None where the loss does not depend on them.
    """

    value: Tensor
    value_linear: Tensor
    f: Tensor | None
    g: Tensor | None


class GradientBuffers(NamedTuple):
    """Tensors that receive the gradients; x and y are placeholders where they are not needed."""

    x: Tensor
    y: Tensor
    log_a: Tensor
    log_b: Tensor
    need_x: bool
    need_y: bool


def unroll(
    launch: LaunchProblem, upstream: Upstream, f: Tensor, n_iter: Tensor, need_x: bool, need_y: bool
) -> Gradients:
    """Compute the total derivative of the run that ended at f after ``n_iter`` iterations."""
    problem = launch.problem
    need_y = need_y and problem.y is not None
    x = problem.x
    grad_x = torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    grad_y = torch.empty_like(launch.y) if need_y else grad_x
    grad_log_a, grad_log_b = torch.empty_like(problem.log_a), torch.empty_like(problem.log_b)
    buffers = GradientBuffers(grad_x, grad_y, grad_log_a, grad_log_b, need_x, need_y)
    steps = max(1, problem.max_iter)
    annealing = problem.log_a.new_zeros(steps)
    if problem.anneal_start > 0:
        launch_kernel(
            annealing_kernel,
            (1,),
            annealing,
            steps,
            problem.anneal_start,
            problem.anneal_ratio,
            num_warps=1,
        )
    _unroll_onchip(launch, upstream, buffers, f, n_iter, annealing)
    if max(launch.n, launch.m) > tuning.RESIDENT:
        StreamedUnroll(launch, upstream, buffers, f, n_iter, annealing).run()
    return grad_x if need_x else None, grad_y if need_y else None, grad_log_a, grad_log_b


def _unroll_onchip(
    launch: LaunchProblem,
    upstream: Upstream,
    buffers: GradientBuffers,
    f: Tensor,
    n_iter: Tensor,
    annealing: Tensor,
) -> None:
    problem = launch.problem
    potentials = upstream.f is not None and upstream.g is not None
    tiles = choose_tiles(launch, tuning.UNROLLED)
    steps = problem.max_iter + 1 if tiles else 0
    path_f, path_g = (x.new_empty(steps * x.numel()) for x in (problem.log_a, problem.log_b))
    for side, tile in tiles:
        launch_kernel(
            unrolled_kernel,
            (launch.size,),
            *launch.pointers(),
            *initial_potentials(problem),
            f,
            n_iter,
            annealing,
            path_f,
            path_g,
            upstream.value,
            upstream.value_linear,
            upstream.f if potentials else f,
            upstream.g if potentials else f,
            buffers.x,
            buffers.y,
            buffers.log_a,
            buffers.log_b,
            *launch.sizes(),
            problem.max_iter,
            1 / problem.rho_a,
            1 / problem.rho_b,
            problem.omega,
            0 if side == min(tuning.UNROLLED) else side // 2 + 1,
            side,
            START=problem.f0 is not None,
            POTENTIALS=potentials,
            NEED_X=buffers.need_x,
            NEED_Y=buffers.need_y,
            BLOCK_G=32,
            # Products of float32 vectors take six times the shared memory of bfloat16 ones.
            ROWS=min(tile.rows, 32) if launch.single else tile.rows,
            PART=tile.part,
            **launch.gradient_dot(problem.x.dtype, launch.y.dtype),
            **tile_options(launch, tile),
        )


@dataclass(frozen=True)
class SideState:
    """Vectors of the rows or columns of a streamed unrolled run.

    Attributes:
        path: (steps + 1, size) potentials before each iteration and after the last.
        anchor, correction: soft-mins of each iteration in two parts; see ``unrolled_replay``.
        adjoint: (steps, size) gradients with respect to the soft-mins.
        weight: (size,) derivative of the value with respect to the entries of the last plan.
        bar: (size,) gradient with respect to the potentials, during the reverse sweep.
        grad_log: gradient of the log-masses.
        upstream: gradient of the loss with respect to the final potentials, or None.
        rho: strength of the marginal penalty.
        size: number of rows or columns, of all problems together.
    """

    path: Tensor
    anchor: Tensor
    correction: Tensor
    adjoint: Tensor
    weight: Tensor
    bar: Tensor
    grad_log: Tensor
    upstream: Tensor | None
    rho: float
    size: int

    @staticmethod
    def allocate(
        log_mass: Tensor,
        start: Tensor | None,
        steps: int,
        grad_log: Tensor,
        upstream: Tensor | None,
        rho: float,
    ) -> "SideState":
        size = log_mass.numel()
        path = log_mass.new_empty(steps + 1, size)
        # Initial potentials of padding may be NaN.
        path[0] = 0 if start is None else torch.where(log_mass != -math.inf, start, 0.0).flatten()
        anchor = torch.zeros_like(path)
        correction, adjoint = log_mass.new_empty(2, max(1, steps), size)
        weight, bar = log_mass.new_empty(2, size)
        return SideState(
            path, anchor, correction, adjoint, weight, bar, grad_log, upstream, rho, size
        )


class StreamedUnroll:
    """Replays a run, sweeps it in reverse and accumulates its gradients, one launch per half-step.

    Only vectors are stored. Every launch takes the rows or, with ``swapped``, the columns of each
    problem; the two sides then exchange their roles.
    """

    def __init__(
        self,
        launch: LaunchProblem,
        upstream: Upstream,
        buffers: GradientBuffers,
        f: Tensor,
        n_iter: Tensor,
        annealing: Tensor,
    ) -> None:
        self.launch, self.upstream, self.buffers = launch, upstream, buffers
        self.annealing = annealing
        self.problem = problem = launch.problem
        self.tile = tile_options(launch, tuning.STREAM)
        steps = problem.max_iter
        self.sides = (
            SideState.allocate(
                problem.log_a, problem.f0, steps, buffers.log_a, upstream.f, problem.rho_a
            ),
            SideState.allocate(
                problem.log_b, problem.g0, steps, buffers.log_b, upstream.g, problem.rho_b
            ),
        )
        self.state, self.steps = torch.empty_like(n_iter), torch.empty_like(n_iter)
        launch_kernel(
            survey_kernel,
            (launch.size,),
            launch.cu_a,
            launch.cu_b,
            problem.log_a,
            problem.log_b,
            f,
            n_iter,
            upstream.value,
            upstream.value_linear,
            f if upstream.f is None else upstream.f,
            f if upstream.g is None else upstream.g,
            self.state,
            self.steps,
            launch.n,
            launch.m,
            tuning.RESIDENT if launch.packed else 0,
            PACKED=launch.packed,
            POTENTIALS=upstream.f is not None and upstream.g is not None,
            BLOCK=tuning.VECTOR_BLOCK,
        )

    def run(self) -> None:
        """Launch the replay, the reverse sweep and the gradients of the cost or the vectors."""
        for k in range(self.problem.max_iter):
            for swapped in (False, True):
                self._replay(swapped, k)
                if k == 0:
                    # The first soft-mins have no predecessor, so they are their own anchors.
                    side = self.sides[swapped]
                    side.anchor[0] = side.anchor[1]
                    self._replay(swapped, k)
        for swapped in (False, True):
            self._weigh(swapped)
        for swapped in (False, True):
            self._reverse(swapped, 0, init=True)
        for k in reversed(range(self.problem.max_iter)):
            self._reverse(False, k)
            self._reverse(True, k)
        if self.buffers.need_x:
            self._gradient(False, self.buffers.x)
        if self.buffers.need_y:
            self._gradient(True, self.buffers.y)

    def _pair(self, swapped: bool) -> tuple[SideState, SideState]:
        return (self.sides[1], self.sides[0]) if swapped else self.sides

    def _grid(self, swapped: bool, block: int) -> tuple[int, int]:
        launch = self.launch
        return launch.size, launch.blocks(launch.m if swapped else launch.n, block)

    def _replay(self, swapped: bool, k: int) -> None:
        """Repeat a half-step of iteration k and record its soft-mins and potentials."""
        rows, columns = self._pair(swapped)
        launch_kernel(
            forth_kernel,
            self._grid(swapped, tuning.STREAM.rows),
            *self.launch.pointers(swapped),
            self.steps,
            self.annealing,
            rows.path,
            rows.anchor,
            rows.correction,
            # The columns' half-step reads the rows' potentials of the same iteration.
            columns.path[1:] if swapped else columns.path,
            *self.launch.sizes(swapped),
            k,
            rows.size,
            columns.size,
            1 / rows.rho,
            self.problem.omega,
            **self.tile,
        )

    def _weigh(self, swapped: bool) -> None:
        """Compute the derivative of the value with respect to the last plan, and to the masses."""
        rows, columns = self._pair(swapped)
        launch_kernel(
            weight_kernel,
            self._grid(swapped, tuning.STREAM.rows),
            *self.launch.pointers(swapped),
            self.state,
            self.steps,
            rows.path,
            columns.path,
            self.upstream.value,
            rows.weight,
            rows.grad_log,
            *self.launch.sizes(swapped),
            rows.size,
            columns.size,
            1 / rows.rho,
            **self.tile,
        )

    def _reverse(self, swapped: bool, k: int, init: bool = False) -> None:
        """Propagate gradients through a half-step of iteration k, or into the run with ``init``."""
        rows, columns = self._pair(swapped)
        launch_kernel(
            back_kernel,
            self._grid(swapped, tuning.STREAM.rows),
            *self.launch.pointers(swapped),
            self.state,
            self.steps,
            self.annealing,
            rows.path,
            columns.path,
            columns.anchor,
            columns.correction,
            rows.adjoint,
            columns.adjoint,
            rows.weight,
            columns.weight,
            self.upstream.value,
            self.upstream.value_linear,
            rows.bar if rows.upstream is None else rows.upstream,
            rows.bar,
            rows.grad_log,
            *self.launch.sizes(swapped),
            k,
            rows.size,
            columns.size,
            1 / rows.rho,
            self.problem.omega,
            INIT=init,
            COLUMNS=swapped,
            POTENTIALS=rows.upstream is not None,
            **self.tile,
        )

    def _gradient_options(self) -> tuple[dict[str, Any], int]:
        """The compile-time options of the gradient kernel, and the parts of a vector."""
        tile = tuning.SINGLE_PARTIAL if self.launch.single else tuning.PARTIAL
        if self.problem.y is None:
            options, parts = tile_options(self.launch, tuning.ADJOINT_STREAM[False]), 1
        else:
            parts = ceil_div(self.launch.dim, tile.entries)
            options = self.tile | {
                "BLOCK_N": tile.rows,
                "BLOCK_M": tile.columns,
                "BLOCK_D": tile.depth,
                "num_warps": self.launch.warps(tile.warps),
                "num_stages": tile.stages,
            }
        return options | {"BLOCK_G": tile.entries}, parts

    def _gradient(self, swapped: bool, grad: Tensor) -> None:
        """Compute the gradient of the cost, or of the vectors of one side."""
        rows, columns = self._pair(swapped)
        options, parts = self._gradient_options()
        grid = (*self._grid(swapped, options["BLOCK_N"]), parts)
        launch_kernel(
            unrolled_gradient_kernel,
            grid,
            *self.launch.pointers(swapped),
            self.state,
            self.steps,
            self.annealing,
            rows.path,
            columns.path,
            rows.anchor,
            columns.anchor,
            rows.correction,
            columns.correction,
            rows.adjoint,
            columns.adjoint,
            rows.weight,
            columns.weight,
            self.upstream.value,
            self.upstream.value_linear,
            grad,
            *self.launch.sizes(swapped),
            rows.size,
            columns.size,
            COLUMNS=swapped,
            **self.launch.gradient_dot(grad.dtype),
            **options,
        )
