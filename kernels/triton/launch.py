"""From the arguments of the operator to launches of the kernels, with no wait for the device."""

import math
import os
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from optical.arguments import Arguments, Gradients, Outputs
from optical.kernels import tuning
from optical.kernels.adjoint import adjoint_kernel
from optical.kernels.adjoint_streamed import adjoint_loop_kernel
from optical.kernels.gradients import cost_gradient_kernel, vector_gradient_kernel
from optical.kernels.resident import resident_kernel
from optical.kernels.streaming import finish_kernel, loop_kernel, turn_kernel, walk_kernel
from optical.kernels.sums import mass_gradient_kernel, product_kernel
from optical.kernels.tokens import centre_kernel, norm_kernel
from optical.kernels.unrolled import unrolled_kernel

KINDS = {"given": 0, "cosine": 1, "sqeuclidean": 2, "dot": 3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def supports(arguments: Arguments) -> str | None:
    """Why the kernels cannot serve these problems, on whatever device; None where they can."""
    p = arguments
    if p.log_a.dtype != torch.float32:
        name = str(p.log_a.dtype).removeprefix("torch.")
        return f"the problem is {name}; the kernels compute in float32"
    if p.anderson:
        return "the kernels do not know anderson; over-relaxation (omega) is what they have"
    longest = max(p.log_a.shape[-1], p.log_b.shape[-1])
    if p.gradient == "unroll" and longest > tuning.RESIDENT:
        what = "packed lines, of problems of unknown sizes" if p.packed else "lines"
        limit = f"works on chip, on up to {tuning.RESIDENT}"
        return f"a side has {longest} {what}; the kernel of gradient='unroll' {limit}"
    return None


class Batch:
    """The problems as the kernels read them: pointers, sizes and what is known of each token."""

    def __init__(self, arguments: Arguments) -> None:
        p = self.arguments = arguments
        self.size = len(p.epsilon)
        self.packed = p.packed
        self.n, self.m = p.log_a.shape[-1], p.log_b.shape[-1]
        self.kind = KINDS[p.kind]
        self.strides = p.x.stride() if p.y is None else (0, 0, 0)
        self.dim = 0 if p.y is None else p.x.shape[-1]
        self.nvidia = torch.version.hip is None and not INTERPRETED
        single = p.x.dtype == torch.float32
        self.single = single
        # Products of float32 numbers lose nothing that matters, products of half precision nothing.
        self.exact = "tf32x3" if self.nvidia else "ieee"
        self.precision = "ieee" if p.y is None else self.exact
        if not single and p.kind != "sqeuclidean":
            self.precision = "ieee"
        # Gradients are rounded to the vectors' dtype, and what pulls at them to one as fine: TF32
        # holds every float16, and a pull in float16 would underflow.
        self.pull, self.pull_precision = tl.float32, self.exact
        if self.nvidia and p.x.dtype == torch.bfloat16:
            self.pull = tl.bfloat16
        elif self.nvidia and p.x.dtype == torch.float16:
            self.pull_precision = "tf32"
        self.scaled = p.kind == "cosine" and single
        # Offsets from the beginning of a problem, where 32 bits are not enough for them.
        reach = max(self.n, self.m) * max(1, self.dim)
        if p.y is None:
            reach = self.n * self.strides[1] + self.m * self.strides[2]
        self.wide = reach >= 2**31
        # Where nothing is read, any pointer serves.
        none = p.epsilon
        self.y = none if p.y is None else p.y
        self.cu_a, self.cu_b = (none if x is None else x for x in (p.cu_a, p.cu_b))
        self.norm_a = self.norm_b = self.scale_a = self.scale_b = self.centre = none
        if p.kind == "sqeuclidean":
            self.centre = torch.empty(self.size, self.dim, device=p.x.device)
            block = 64
            grid = (self.size, triton.cdiv(self.dim, block))
            centre_kernel[grid](
                p.x,
                p.y,
                self.cu_a,
                self.cu_b,
                p.log_a,
                p.log_b,
                self.centre,
                self.n,
                self.m,
                self.dim,
                PACKED=self.packed,
                BLOCK_T=32,
                BLOCK_D=block,
            )
        if p.kind in ("cosine", "sqeuclidean"):
            self.norm_a, self.scale_a = self._norms(p.x, self.cu_a, p.log_a)
            self.norm_b, self.scale_b = self._norms(self.y, self.cu_b, p.log_b)

    def _norms(self, vectors: Tensor, offsets: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
        norm, scale = torch.empty_like(log_mass), torch.empty_like(log_mass)
        lines, block = log_mass.shape[-1], 16
        # With offsets nobody here knows how long a problem is; each program takes every so many.
        splits = min(triton.cdiv(lines, block), max(1, 4096 // self.size))
        norm_kernel[(self.size, splits)](
            vectors,
            offsets,
            self.centre,
            norm,
            scale,
            lines,
            self.dim,
            KIND=self.kind,
            PACKED=self.packed,
            SCALED=self.scaled,
            BLOCK_T=block,
            BLOCK_D=max(16, min(128, triton.next_power_of_2(self.dim))),
        )
        return norm, scale

    def sources(self, swapped: bool = False) -> tuple[Tensor, ...]:
        """The pointers from which a tile of the cost is made, in the order of the kernels."""
        p = self.arguments
        x, y = (p.x, self.y) if p.y is not None else (p.x, p.x)
        tokens = [(x, y), (self.norm_a, self.norm_b), (self.scale_a, self.scale_b)]
        lines = [(self.cu_a, self.cu_b), (p.log_a, p.log_b)]
        order = (1, 0) if swapped else (0, 1)
        of_tokens, of_lines = (
            [pair[i] for pair in pairs for i in order] for pairs in (tokens, lines)
        )
        return *of_tokens, self.centre, *of_lines, p.epsilon

    def sizes(self, swapped: bool = False) -> tuple[int, ...]:
        """The strides of a given cost, the longest sides, and how long a vector is."""
        batch, row, column = self.strides
        if swapped:
            return batch, column, row, self.m, self.n, self.dim
        return batch, row, column, self.n, self.m, self.dim

    def blocks(self, lines: int, block: int) -> int:
        """How many programs share the lines of a problem; packed ones may have any share of all."""
        count: int = triton.cdiv(lines, block)
        return count if not self.packed else min(count, max(1, 1024 // self.size))


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
        if max(batch.n, batch.m) > tuning.RESIDENT:
            # One program runs a problem where sizes are unknown or problems many.
            if batch.size > (1 if batch.packed else tuning.PROGRAMS):
                _loop(batch, f, g, outputs)
            else:
                _steps(batch, f, g, outputs)
        for side, tile in tiles_of(batch, tuning.ROOMY if roomy else tuning.TILES):
            resident_kernel[(batch.size,)](
                *batch.sources(),
                *_starts(p),
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
                num_warps=tile.warps,
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
            num_warps=tile.warps,
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
            **_tile(batch, tile),
        )
    return w, z, residual


def tiles_of(batch: Batch, table: dict[int, tuning.Tile]) -> list[tuple[int, tuning.Tile]]:
    """The tiles to launch: one where the longest side is known, otherwise all that may be met."""
    longest = max(batch.n, batch.m)
    fitting = [(side, tile) for side, tile in table.items() if side >= longest]
    if not batch.packed:
        return fitting[:1]
    last = fitting[0][0] if fitting else max(table)
    return [(side, tile) for side, tile in table.items() if side <= last]


def _starts(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Where to start; any pointer where that is 0."""
    p = arguments
    return (p.epsilon if p.f0 is None else p.f0), (p.epsilon if p.g0 is None else p.g0)


def _tile(batch: Batch, tile: tuning.Tile) -> dict[str, Any]:
    """What every kernel of tiles is told of its problems and of its tile."""
    return {
        "KIND": batch.kind,
        "PACKED": batch.packed,
        "SCALED": batch.scaled,
        "WIDE": batch.wide,
        "PRECISION": batch.precision,
        "BLOCK_N": tile.rows,
        "BLOCK_M": tile.columns,
        "BLOCK_D": tile.depth,
        "WARPS_N": tile.warps_n,
        "WARPS_M": tile.warps_m,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _loop(batch: Batch, f: Tensor, g: Tensor, outputs: tuple[Tensor, ...]) -> None:
    p = batch.arguments
    scratch = [torch.empty_like(x) for x in (p.log_a, p.log_b, p.log_a, p.log_b)]
    loop_kernel[(batch.size,)](
        *batch.sources(),
        *_starts(p),
        f,
        g,
        *scratch,
        *outputs,
        *batch.sizes(),
        p.max_iter,
        p.tol,
        1 / p.rho_a,
        1 / p.rho_b,
        p.omega,
        p.anneal_start,
        p.anneal_ratio,
        tuning.RESIDENT if batch.packed else 0,
        START=p.f0 is not None,
        BLOCK=tuning.LINES,
        **_tile(batch, tuning.STREAM),
    )


def _steps(batch: Batch, f: Tensor, g: Tensor, outputs: tuple[Tensor, ...]) -> None:
    p, tile = batch.arguments, _tile(batch, tuning.STREAM)
    found_a, found_b, spent_a, spent_b = (
        torch.empty_like(x) for x in (p.log_a, p.log_b, p.log_a, p.log_b)
    )
    n_iter = outputs[3]
    stopped = torch.empty_like(n_iter)
    starts = _starts(p)
    options = {"PACKED": batch.packed, "START": p.f0 is not None, "BLOCK": tuning.LINES}
    rows = batch.cu_a, p.log_a, p.epsilon, starts[0], f, found_a, stopped, n_iter, batch.n
    columns = batch.cu_b, p.log_b, p.epsilon, starts[1], g, found_b, stopped, n_iter, batch.m

    def walk(swapped: bool, annealing: float, seen: int) -> None:
        sides = (g, f, found_b, spent_b) if swapped else (f, g, found_a, spent_a)
        blocks = batch.blocks(batch.m if swapped else batch.n, tuning.STREAM.rows)
        walk_kernel[(batch.size, blocks)](
            *batch.sources(swapped), *sides, stopped, *batch.sizes(swapped), annealing, seen, **tile
        )

    def turn(swapped: bool, iteration: int, begin: bool = False) -> None:
        lines, rho = (columns, p.rho_b) if swapped else (rows, p.rho_a)
        annealing, before = (p.anneal_start * p.anneal_ratio**k for k in (iteration, iteration - 1))
        turn_kernel[(batch.size,)](
            *lines,
            int(iteration == 0),
            p.tol,
            1 / rho,
            p.omega,
            annealing,
            # Nothing came before the first iteration, so no residual is measured there.
            before if iteration else math.inf,
            ROWS=not swapped,
            BEGIN=begin,
            **options,
        )

    turn(False, 0, begin=True)
    turn(True, 0, begin=True)
    for iteration in range(p.max_iter):
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
        *starts,
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
            arriving = grad_value, grad_value_linear, grad_f, grad_g
            return _unrolled(batch, arriving, f, n_iter, need_x, need_y)
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


def _unrolled(
    batch: Batch,
    upstream: tuple[Tensor | None, ...],
    f: Tensor,
    n_iter: Tensor,
    need_x: bool,
    need_y: bool,
) -> Gradients:
    p = batch.arguments
    grad_value, grad_value_linear, grad_f, grad_g = upstream
    potentials = grad_f is not None and grad_g is not None
    shape = p.x.shape if need_x else (0,)
    grad_x = torch.empty(shape, dtype=p.x.dtype, device=p.x.device)
    grad_y = torch.empty_like(batch.y) if need_y else grad_x
    grad_log_a, grad_log_b = torch.empty_like(p.log_a), torch.empty_like(p.log_b)
    steps = torch.arange(p.max_iter, dtype=torch.float64, device=p.x.device)
    annealing = (p.anneal_start * p.anneal_ratio**steps).float()
    path_f, path_g = (x.new_empty((p.max_iter + 1) * x.numel()) for x in (p.log_a, p.log_b))
    for side, tile in tiles_of(batch, tuning.ADJOINT):
        unrolled_kernel[(batch.size,)](
            *batch.sources(),
            *_starts(p),
            f,
            n_iter,
            annealing,
            path_f,
            path_g,
            grad_value,
            grad_value_linear,
            grad_f if potentials else f,
            grad_g if potentials else f,
            grad_x,
            grad_y,
            grad_log_a,
            grad_log_b,
            *batch.sizes(),
            p.max_iter,
            1 / p.rho_a,
            1 / p.rho_b,
            p.omega,
            0 if side == min(tuning.ADJOINT) else side // 2 + 1,
            side,
            START=p.f0 is not None,
            POTENTIALS=potentials,
            NEED_X=need_x,
            NEED_Y=need_y and p.y is not None,
            PULL=batch.pull,
            PULL_PRECISION=batch.pull_precision,
            BLOCK_G=32,
            **_tile(batch, tile),
            PART=tile.part,
        )
    return (
        grad_x if need_x else None,
        grad_y if need_y and p.y is not None else None,
        grad_log_a,
        grad_log_b,
    )


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
            num_warps=tile.warps,
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
        num_warps=tile.warps,
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
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return product
