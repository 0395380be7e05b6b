"""Unrolled gradients: the launches, on chip and streamed; nothing waits for the device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import triton
from optical.arguments import Gradients
from optical.kernels import tuning
from optical.kernels.batch import Batch, starts, tile_options, tiles_of
from optical.kernels.onchip.unrolled import unrolled_kernel
from optical.kernels.streamed.unrolled_backward import back_kernel, unrolled_gradient_kernel
from optical.kernels.streamed.unrolled_replay import forth_kernel, survey_kernel, weight_kernel


class Arriving(NamedTuple):
    """Upstream gradients; of the potentials only where there are some."""

    value: Tensor
    value_linear: Tensor
    f: Tensor | None
    g: Tensor | None


class Wanted(NamedTuple):
    """The gradients to fill; any tensor where one is not needed."""

    x: Tensor
    y: Tensor
    log_a: Tensor
    log_b: Tensor
    need_x: bool
    need_y: bool


def unroll(
    batch: Batch, arriving: Arriving, f: Tensor, n_iter: Tensor, need_x: bool, need_y: bool
) -> Gradients:
    """The total derivative of the run that ended at f after ``n_iter`` iterations."""
    p = batch.arguments
    need_y = need_y and p.y is not None
    grad_x = torch.empty(p.x.shape if need_x else (0,), dtype=p.x.dtype, device=p.x.device)
    grad_y = torch.empty_like(batch.y) if need_y else grad_x
    wanted = Wanted(
        grad_x, grad_y, torch.empty_like(p.log_a), torch.empty_like(p.log_b), need_x, need_y
    )
    steps = torch.arange(max(1, p.max_iter), dtype=torch.float64, device=p.x.device)
    annealing = (p.anneal_start * p.anneal_ratio**steps).float()
    _on_chip(batch, arriving, wanted, f, n_iter, annealing)
    if max(batch.n, batch.m) > tuning.RESIDENT:
        _streamed(batch, arriving, wanted, f, n_iter, annealing)
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        wanted.log_a,
        wanted.log_b,
    )


def _on_chip(
    batch: Batch, arriving: Arriving, wanted: Wanted, f: Tensor, n_iter: Tensor, annealing: Tensor
) -> None:
    p = batch.arguments
    potentials = arriving.f is not None and arriving.g is not None
    tiles = tiles_of(batch, tuning.ADJOINT)
    room = p.max_iter + 1 if tiles else 0
    path_f, path_g = (x.new_empty(room * x.numel()) for x in (p.log_a, p.log_b))
    for side, tile in tiles:
        unrolled_kernel[(batch.size,)](
            *batch.sources(),
            *starts(p),
            f,
            n_iter,
            annealing,
            path_f,
            path_g,
            arriving.value,
            arriving.value_linear,
            arriving.f if potentials else f,
            arriving.g if potentials else f,
            wanted.x,
            wanted.y,
            wanted.log_a,
            wanted.log_b,
            *batch.sizes(),
            p.max_iter,
            1 / p.rho_a,
            1 / p.rho_b,
            p.omega,
            0 if side == min(tuning.ADJOINT) else side // 2 + 1,
            side,
            START=p.f0 is not None,
            POTENTIALS=potentials,
            NEED_X=wanted.need_x,
            NEED_Y=wanted.need_y,
            PULL=batch.pull,
            PULL_PRECISION=batch.pull_precision,
            BLOCK_G=32,
            **tile_options(batch, tile),
            PART=tile.part,
        )


class _Side(NamedTuple):
    """What a side of a streamed run keeps: by iteration, then of the sweep in reverse."""

    path: Tensor
    anchor: Tensor
    missing: Tensor
    arrived: Tensor
    weight: Tensor
    bar: Tensor
    grad_log: Tensor
    arriving: Tensor | None
    rho: float
    lines: int

    @staticmethod
    def of(
        log_mass: Tensor,
        start: Tensor | None,
        steps: int,
        grad_log: Tensor,
        arriving: Tensor | None,
        rho: float,
    ) -> "_Side":
        lines = log_mass.numel()
        path = log_mass.new_empty(steps + 1, lines)
        # What stands at an absent line may be no number.
        path[0] = 0 if start is None else torch.where(log_mass != -math.inf, start, 0.0).flatten()
        anchor = torch.zeros_like(path)
        missing, arrived = log_mass.new_empty(2, max(1, steps), lines)
        weight, bar = log_mass.new_empty(2, lines)
        return _Side(path, anchor, missing, arrived, weight, bar, grad_log, arriving, rho, lines)


def _streamed(
    batch: Batch, arriving: Arriving, wanted: Wanted, f: Tensor, n_iter: Tensor, annealing: Tensor
) -> None:
    p, tile = batch.arguments, tile_options(batch, tuning.STREAM)
    rows = _Side.of(p.log_a, p.f0, p.max_iter, wanted.log_a, arriving.f, p.rho_a)
    columns = _Side.of(p.log_b, p.g0, p.max_iter, wanted.log_b, arriving.g, p.rho_b)
    state, steps = torch.empty_like(n_iter), torch.empty_like(n_iter)
    survey_kernel[(batch.size,)](
        batch.cu_a,
        batch.cu_b,
        p.log_a,
        p.log_b,
        f,
        n_iter,
        state,
        steps,
        batch.n,
        batch.m,
        tuning.RESIDENT if batch.packed else 0,
        PACKED=batch.packed,
        BLOCK=tuning.LINES,
    )
    values = arriving.value, arriving.value_linear

    def sides(swapped: bool) -> tuple[_Side, _Side, tuple[int, int]]:
        blocks = batch.blocks(batch.m if swapped else batch.n, tuning.STREAM.rows)
        both = (columns, rows) if swapped else (rows, columns)
        return *both, (batch.size, blocks)

    def forth(swapped: bool, k: int) -> None:
        own, other, grid = sides(swapped)
        forth_kernel[grid](
            *batch.sources(swapped),
            steps,
            annealing,
            own.path,
            own.anchor,
            own.missing,
            # The rows were done before the columns.
            other.path[1:] if swapped else other.path,
            *batch.sizes(swapped),
            k,
            own.lines,
            other.lines,
            1 / own.rho,
            p.omega,
            **tile,
        )

    def weigh(swapped: bool) -> None:
        own, other, grid = sides(swapped)
        weight_kernel[grid](
            *batch.sources(swapped),
            state,
            steps,
            own.path,
            other.path,
            arriving.value,
            own.weight,
            own.grad_log,
            *batch.sizes(swapped),
            own.lines,
            other.lines,
            1 / own.rho,
            **tile,
        )

    def back(swapped: bool, k: int, begin: bool = False) -> None:
        own, other, grid = sides(swapped)
        back_kernel[grid](
            *batch.sources(swapped),
            state,
            steps,
            annealing,
            own.path,
            other.path,
            other.anchor,
            other.missing,
            own.arrived,
            other.arrived,
            own.weight,
            other.weight,
            *values,
            own.bar if own.arriving is None else own.arriving,
            own.bar,
            own.grad_log,
            *batch.sizes(swapped),
            k,
            own.lines,
            other.lines,
            1 / own.rho,
            p.omega,
            BEGIN=begin,
            COLUMNS=swapped,
            POTENTIALS=own.arriving is not None,
            **tile,
        )

    def pull(swapped: bool, grad: Tensor) -> None:
        own, other, _ = sides(swapped)
        grain = tuning.SINGLE_PARTIAL if batch.single else tuning.PARTIAL
        options = tile | {
            "BLOCK_N": grain.rows,
            "BLOCK_M": grain.columns,
            "BLOCK_D": grain.depth,
            "num_warps": batch.warps(grain.warps),
            "num_stages": grain.stages,
        }
        if p.y is None:
            options = tile_options(batch, tuning.ADJOINT_STREAM[False])
        parts = 1 if p.y is None else triton.cdiv(batch.dim, grain.pull)
        blocks = batch.blocks(batch.m if swapped else batch.n, options["BLOCK_N"])
        unrolled_gradient_kernel[(batch.size, blocks, parts)](
            *batch.sources(swapped),
            state,
            steps,
            annealing,
            own.path,
            other.path,
            own.anchor,
            other.anchor,
            own.missing,
            other.missing,
            own.arrived,
            other.arrived,
            own.weight,
            other.weight,
            *values,
            grad,
            *batch.sizes(swapped),
            own.lines,
            other.lines,
            COLUMNS=swapped,
            PULL=batch.pull,
            PULL_PRECISION=batch.pull_precision,
            BLOCK_G=grain.pull,
            **options,
        )

    for k in range(p.max_iter):
        for side, swapped in ((rows, False), (columns, True)):
            forth(swapped, k)
            if k == 0:
                # The first minima have no anchor but themselves.
                side.anchor[0] = side.anchor[1]
                forth(swapped, k)
    for swapped in (False, True):
        weigh(swapped)
    for swapped in (False, True):
        back(swapped, 0, begin=True)
    for k in reversed(range(p.max_iter)):
        back(False, k)
        back(True, k)
    if wanted.need_x:
        pull(False, wanted.x)
    if wanted.need_y:
        pull(True, wanted.y)
