"""From the arguments of the operator to its outputs, with no wait for the device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import triton
from optical.arguments import Arguments, Outputs
from optical.kernels import tuning
from optical.kernels.batch import KINDS, Batch, starts, tile_options, tiles_of
from optical.kernels.onchip.adjoint import adjoint_kernel
from optical.kernels.onchip.solve import resident_kernel
from optical.kernels.streamed.adjoint import adjoint_loop_kernel
from optical.kernels.streamed.logsumexp import SEGMENT
from optical.kernels.streamed.single_launch import loop_kernel
from optical.kernels.streamed.stepwise import (
    finish_kernel,
    gather_kernel,
    keep_kernel,
    turn_kernel,
    walk_kernel,
)


def supports(arguments: Arguments) -> str | None:
    """Why the kernels cannot serve these problems, on whatever device; None where they can."""
    p = arguments
    if p.log_a.dtype != torch.float32:
        name = str(p.log_a.dtype).removeprefix("torch.")
        return f"the problem is {name}; the kernels compute in float32"
    if p.anderson:
        return "the kernels do not know anderson; over-relaxation (omega) is what they have"
    return None


def forward(arguments: Arguments) -> Outputs:
    """As ``optical.reference.forward``, for everything that ``supports`` does not refuse."""
    with torch.cuda.device_of(arguments.x):
        batch = Batch(arguments)
        p, like = arguments, arguments.epsilon
        value, value_linear, marginal_error = (torch.empty_like(like) for _ in range(3))
        n_iter, status = (torch.empty_like(like, dtype=torch.int32) for _ in range(2))
        f, g = torch.empty_like(p.log_a), torch.empty_like(p.log_b)
        general = p.omega != 1 or min(p.rho_a, p.rho_b) < math.inf
        roomy = general or p.anneal_start > 0 or batch.precision != "ieee"
        outputs = value, value_linear, marginal_error, n_iter, status
        tiles = tiles_of(batch, tuning.ROOMY if roomy else tuning.TILES)
        if not tiles or (batch.packed and max(batch.n, batch.m) > tuning.RESIDENT):
            # One program runs a problem where sizes are unknown or problems many.
            if batch.size > (1 if batch.packed else tuning.PROGRAMS):
                _loop(batch, f, g, outputs)
            else:
                _steps(batch, f, g, outputs)
        for side, tile in tiles:
            resident_kernel[(batch.size,)](
                *batch.sources(),
                *starts(p),
                f,
                g,
                *outputs,
                *batch.sizes(),
                p.max_iter,
                p.tol,
                1 / p.rho_a,
                1 / p.rho_b,
                p.omega,
                p.anneal_start,
                p.anneal_ratio,
                0 if side == min(tuning.TILES) else side // 2 + 1,
                side,
                KIND=batch.kind,
                PACKED=batch.packed,
                START=p.f0 is not None,
                GENERAL=general,
                ANNEAL=p.anneal_start > 0,
                STEPS=1 if general or p.tol > 0 else tuning.STEPS,
                SCALED=batch.scaled,
                WIDE=batch.wide,
                PRECISION=batch.precision,
                NVIDIA=batch.nvidia,
                BLOCK_N=tile.rows,
                BLOCK_M=tile.columns,
                BLOCK_D=tile.depth,
                PART=tile.part,
                WARPS_N=tile.warps_n,
                WARPS_M=tile.warps_m,
                num_warps=batch.warps(tile.warps),
                num_stages=tile.stages,
            )
        w, z, residual = _adjoint(batch, f, g)
    return Outputs(value, value_linear, f, g, marginal_error, n_iter, status, w, z, residual)


def _adjoint(batch: Batch, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = batch.arguments
    residual = torch.zeros_like(p.epsilon)
    if p.gradient != "implicit":
        return f.new_zeros(0), g.new_zeros(0), residual
    w, z = torch.empty_like(f), torch.empty_like(g)
    if max(batch.n, batch.m) > tuning.RESIDENT:
        tile = tuning.ADJOINT_STREAM[batch.kind != KINDS["given"] and batch.precision != "ieee"]
        adjoint_loop_kernel[(batch.size,)](
            *batch.sources(),
            f,
            g,
            w,
            z,
            residual,
            p.log_a.new_empty(3 * f.numel(), dtype=torch.float64),
            p.log_a.new_empty(7 * g.numel(), dtype=torch.float64),
            *batch.sizes(),
            1 / p.rho_a,
            1 / p.rho_b,
            tuning.RESIDENT if batch.packed else 0,
            KIND=batch.kind,
            PACKED=batch.packed,
            SCALED=batch.scaled,
            WIDE=batch.wide,
            PRECISION=batch.precision,
            BLOCK=tile.rows,
            BLOCK_D=tile.depth,
            WARPS_N=tile.warps_n,
            WARPS_M=tile.warps_m,
            LINES=tuning.LINES,
            num_warps=batch.warps(tile.warps),
            num_stages=tile.stages,
        )
    for side, tile in tiles_of(batch, tuning.ADJOINT):
        adjoint_kernel[(batch.size,)](
            *batch.sources(),
            f,
            g,
            w,
            z,
            residual,
            *batch.sizes(),
            1 / p.rho_a,
            1 / p.rho_b,
            0 if side == min(tuning.ADJOINT) else side // 2 + 1,
            side,
            PART=tile.part,
            **tile_options(batch, tile),
        )
    return w, z, residual


class Kept(NamedTuple):
    """Room for a plan in half precision, and for the potentials at which it is written."""

    fast: bool
    start_a: Tensor
    start_b: Tensor
    plan: Tensor
    width: int
    plane: int


def _kept(batch: Batch) -> Kept:
    """The room of the runs that use it: whose sizes are known and that nothing holds back."""
    p, tile = batch.arguments, tuning.STREAM
    width = triton.cdiv(batch.m, tile.columns) * tile.columns
    plane = triton.cdiv(batch.n, tile.rows) * tile.rows * width
    plain = p.omega == 1 and p.rho_a == p.rho_b == math.inf
    fast = p.precision == "fast" and plain and not (p.packed or p.low_memory)
    if not fast or p.max_iter < tuning.KEPT_ITERATIONS or plane >= 2**31:
        # Where nothing is read, any pointer serves.
        return Kept(False, p.epsilon, p.epsilon, p.epsilon, 0, 0)
    plan = p.log_a.new_empty(batch.size * plane, dtype=torch.float16)
    return Kept(True, torch.empty_like(p.log_a), torch.empty_like(p.log_b), plan, width, plane)


def _loop(batch: Batch, f: Tensor, g: Tensor, outputs: tuple[Tensor, ...]) -> None:
    p, kept = batch.arguments, _kept(batch)
    scratch = [torch.empty_like(x) for x in (p.log_a, p.log_b, p.log_a, p.log_b)]
    loop_kernel[(batch.size,)](
        *batch.sources(),
        *starts(p),
        f,
        g,
        *scratch,
        kept.start_a,
        kept.start_b,
        kept.plan,
        *outputs,
        *batch.sizes(),
        kept.width,
        kept.plane,
        p.max_iter,
        p.tol,
        1 / p.rho_a,
        1 / p.rho_b,
        p.omega,
        p.anneal_start,
        p.anneal_ratio,
        tuning.RESIDENT if batch.packed else 0,
        FAST=kept.fast,
        START=p.f0 is not None,
        BLOCK=tuning.LINES,
        **tile_options(batch, tuning.STREAM),
    )


def _steps(batch: Batch, f: Tensor, g: Tensor, outputs: tuple[Tensor, ...]) -> None:
    p, tile = batch.arguments, tile_options(batch, tuning.STREAM)
    found_a, found_b, spent_a, spent_b = (
        torch.empty_like(x) for x in (p.log_a, p.log_b, p.log_a, p.log_b)
    )
    n_iter = outputs[3]
    stopped, state = torch.empty_like(n_iter), torch.empty_like(n_iter)
    moved, kept = torch.empty_like(p.epsilon), _kept(batch)
    begins = starts(p)
    options = {"PACKED": batch.packed, "START": p.f0 is not None, "BLOCK": tuning.LINES}
    rows = batch.cu_a, p.log_a, p.epsilon, begins[0], f, found_a, kept.start_a
    columns = batch.cu_b, p.log_b, p.epsilon, begins[1], g, found_b, kept.start_b

    # Where the rows alone would not fill a GPU, programs share the columns, segment by segment.
    shares, room = [], 1
    for own, other, lines in ((batch.n, batch.m, f.numel()), (batch.m, batch.n, g.numel())):
        programs = batch.size * batch.blocks(own, tuning.STREAM.rows)
        segments = triton.cdiv(other, SEGMENT.value)
        share = 1 if kept.fast else min(segments, max(1, tuning.FILLED // programs))
        shares.append(share)
        room = max(room, segments * 3 * lines if share > 1 else 0)
    part = f.new_empty(room)

    def walk(swapped: bool, annealing: float, seen: int) -> None:
        sides = (g, f, found_b, spent_b) if swapped else (f, g, found_a, spent_a)
        origins = (kept.start_b, kept.start_a) if swapped else (kept.start_a, kept.start_b)
        own, other = (batch.m, batch.n) if swapped else (batch.n, batch.m)
        lines = sides[0].numel()
        blocks, share = batch.blocks(own, tuning.STREAM.rows), 1 if seen else shares[swapped]
        walk_kernel[(batch.size, blocks, share)](
            *batch.sources(swapped),
            *sides,
            *origins,
            kept.plan,
            part,
            state,
            stopped,
            *batch.sizes(swapped),
            lines,
            kept.width,
            kept.plane,
            annealing,
            SPLIT=share > 1,
            SEEN=seen,
            ROWS=kept.fast and not swapped,
            FAST=kept.fast and seen == 0,
            **tile,
        )
        if share > 1:
            offsets = (batch.cu_b, batch.cu_a) if swapped else (batch.cu_a, batch.cu_b)
            gather_kernel[(batch.size, batch.blocks(own, tuning.LINES))](
                *offsets,
                p.epsilon,
                part,
                sides[2],
                stopped,
                own,
                other,
                lines,
                annealing,
                PACKED=batch.packed,
                BLOCK=tuning.LINES,
            )

    def turn(swapped: bool, iteration: int, begin: bool = False) -> None:
        lines, rho = (columns, p.rho_b) if swapped else (rows, p.rho_a)
        annealing, before = (p.anneal_start * p.anneal_ratio**k for k in (iteration, iteration - 1))
        turn_kernel[(batch.size,)](
            *lines,
            state,
            moved,
            stopped,
            n_iter,
            batch.m if swapped else batch.n,
            int(iteration == 0),
            p.max_iter - 1 - iteration,
            p.tol,
            1 / rho,
            p.omega,
            annealing,
            # Nothing came before the first iteration, so no residual is measured there.
            before if iteration else math.inf,
            ROWS=not swapped,
            FAST=kept.fast,
            BEGIN=begin,
            **options,
        )

    def keep() -> None:
        keep_kernel[(batch.size, batch.blocks(batch.n, tuning.STREAM.rows))](
            *batch.sources(),
            kept.start_a,
            kept.start_b,
            kept.plan,
            state,
            stopped,
            *batch.sizes(),
            kept.width,
            kept.plane,
            **tile,
        )

    turn(False, 0, begin=True)
    turn(True, 0, begin=True)
    for iteration in range(p.max_iter):
        if kept.fast:
            keep()
        for swapped in (False, True):
            walk(swapped, p.anneal_start * p.anneal_ratio**iteration, seen=0)
            turn(swapped, iteration)
    walk(False, 0.0, seen=1)
    walk(True, 0.0, seen=1)
    finish_kernel[(batch.size,)](
        batch.cu_a,
        batch.cu_b,
        p.log_a,
        p.log_b,
        p.epsilon,
        *begins,
        f,
        g,
        found_a,
        found_b,
        spent_a,
        spent_b,
        *outputs,
        stopped,
        batch.n,
        batch.m,
        p.max_iter,
        1 / p.rho_a,
        1 / p.rho_b,
        **options,
    )
