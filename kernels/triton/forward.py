"""Forward pass of the operator: chooses the kernels of a batch and launches them.

Problems that fit in the registers of one program run in ``onchip``, larger ones in ``streamed``.
Kernels are launched without synchronising with the device.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optical.backends.problem import FIRST_OPTION, Problem, Solution
from optical.kernels import tuning
from optical.kernels.batch import (
    LaunchProblem,
    Layout,
    annealing_temperatures,
    ceil_div,
    choose_tiles,
    cost_options,
    initial_potentials,
    onchip_table,
    tile_options,
)
from optical.kernels.launch import KeptLaunch, RepeatedLaunch, launch_kernel
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
from optical.kernels.tokens.norms import Norms


def supports(problem: Problem) -> str | None:
    """Return why the kernels cannot serve the problems on any device, or None if they can."""
    if problem.log_a.dtype != torch.float32:
        name = str(problem.log_a.dtype).removeprefix("torch.")
        return f"the problem is {name}; the kernels compute in float32"
    if problem.anderson:
        return "the kernels do not support anderson; they accelerate by over-relaxation (omega)"
    return None


def forward(
    problem: Problem, values_only: bool = False, kept: list[Norms] | None = None
) -> Solution:
    """Solve the problems, which must be supported, as the ``forward`` of every backend does.

    With ``values_only``, what only describes the run may be left out; see ``Solution.allocate``.
    ``kept`` receives what ``backward`` would otherwise compute again.
    """
    with torch.cuda.device_of(problem.x):
        launch = LaunchProblem(problem)
        if kept is not None and problem.y is not None:
            kept.append(launch.norms)
        general = problem.omega != 1 or min(problem.rho_a, problem.rho_b) < math.inf
        roomy = general or problem.anneal_start > 0 or launch.precision.startswith("tf32")
        table = tuning.ROOMY if roomy else tuning.TILES
        tiles = choose_tiles(launch, onchip_table(launch, table))
        longer = launch.packed and max(launch.n, launch.m) > tuning.RESIDENT
        streamed = longer or not tiles
        # Other kernels and gradients read more than the values.
        values_only = values_only and not streamed and problem.gradient == "envelope"
        solution = Solution.allocate(problem, values_only)
        value, value_linear, f, g, error, n_iter, status, w, z, residual = solution
        if values_only:
            # The kernel still writes what nobody reads.
            error = residual = torch.empty_like(value)
            n_iter = status = torch.empty_like(value, dtype=torch.int32)
        outputs = value, value_linear, error, n_iter, status, residual
        if streamed:
            # One program per problem where the sizes are unknown or the problems are many.
            if launch.size > (1 if launch.packed else tuning.PROGRAMS):
                _solve_in_one_launch(launch, f, g, outputs)
            else:
                StepwiseSolve(launch, f, g, outputs).run()
        if tiles:
            tensors = *launch.pointers(), *initial_potentials(problem), f, g, *outputs
            options = general, problem.f0 is not None, *problem[FIRST_OPTION:]
            for side, tile in tiles:
                least = 0 if side == tiles[0][0] else side // 2 + 1
                _onchip_launch(launch.layout, (least, side), tile, *options)(*tensors)
        if problem.gradient == "implicit":
            _solve_adjoint(launch, f, g, w, z, residual)
    return solution


@functools.lru_cache(maxsize=4096)
def _onchip_launch(
    layout: Layout,
    sides: tuple[int, int],
    tile: tuning.Tile,
    general: bool,
    start: bool,
    *options: Any,
) -> KeptLaunch:
    """The launch that solves problems whose longest side is within ``sides`` on chip.

    ``start``: from given potentials. ``options`` are the fields of a ``Problem`` from ``max_iter``.
    """
    max_iter, tol, rho_a, rho_b, omega, _, anneal_start, anneal_ratio = options[:8]
    return KeptLaunch(
        resident_kernel,
        (layout.size,),
        *layout.sizes(),
        *(max_iter, tol, 1 / rho_a, 1 / rho_b, omega, anneal_start, anneal_ratio),
        *sides,
        START=start,
        GENERAL=general,
        ANNEAL=anneal_start > 0,
        STEPS=1 if general or tol > 0 else tuning.STEPS,
        NVIDIA=layout.nvidia,
        PART=tile.part,
        **tile_options(layout, tile),
    )


def _solve_adjoint(
    launch: LaunchProblem, f: Tensor, g: Tensor, w: Tensor, z: Tensor, residual: Tensor
) -> None:
    """Solve the linear systems behind implicit gradients: fill w and z.

    ``residual``, 0 after the run, receives their residuals.
    """
    problem = launch.problem
    if max(launch.n, launch.m) > tuning.RESIDENT:
        tile = tuning.ADJOINT_STREAM[launch.precision.startswith("tf32")]
        launch_kernel(
            adjoint_loop_kernel,
            (launch.size,),
            *launch.pointers(),
            f,
            g,
            w,
            z,
            residual,
            problem.log_a.new_empty(3 * f.numel(), dtype=torch.float64),
            problem.log_a.new_empty(7 * g.numel(), dtype=torch.float64),
            *launch.sizes(),
            1 / problem.rho_a,
            1 / problem.rho_b,
            tuning.RESIDENT if launch.packed else 0,
            BLOCK=tile.rows,
            BLOCK_D=tile.depth,
            WARPS_N=tile.warps_n,
            WARPS_M=tile.warps_m,
            VECTOR_BLOCK=tuning.VECTOR_BLOCK,
            **cost_options(launch),
            num_warps=launch.warps(tile.warps),
            num_stages=tile.stages,
        )
    for side, tile in choose_tiles(launch, tuning.ADJOINT):
        launch_kernel(
            adjoint_kernel,
            (launch.size,),
            *launch.pointers(),
            f,
            g,
            w,
            z,
            residual,
            *launch.sizes(),
            1 / problem.rho_a,
            1 / problem.rho_b,
            0 if side == min(tuning.ADJOINT) else side // 2 + 1,
            side,
            PART=tile.part,
            **tile_options(launch, tile),
        )


class StoredPlan(NamedTuple):
    """Memory for the plan in half precision and for the potentials at which it was computed.

    Attributes:
        fast: whether the run stores plans at all; if not, the tensors are placeholders.
        base_a, base_b: potentials of the stored plan.
        plan: float16, ``plane`` entries per problem, ``width`` per row.
    """

    fast: bool
    base_a: Tensor
    base_b: Tensor
    plan: Tensor
    width: int
    plane: int


def allocate_plan(launch: LaunchProblem) -> StoredPlan:
    """Allocate a plan in half precision where ``precision="fast"`` applies.

    It applies to padded problems with fixed marginals and no over-relaxation that run long enough
    for the stored plan to pay off and whose indices fit in 32 bits.
    """
    problem, tile = launch.problem, tuning.STREAM
    width = ceil_div(launch.m, tile.columns) * tile.columns
    plane = ceil_div(launch.n, tile.rows) * tile.rows * width
    plain = problem.omega == 1 and problem.rho_a == problem.rho_b == math.inf
    fast = problem.precision == "fast" and plain and not (problem.packed or problem.low_memory)
    if not fast or problem.max_iter < tuning.KEPT_ITERATIONS or plane >= 2**31:
        unused = problem.epsilon
        return StoredPlan(False, unused, unused, unused, 0, 0)
    plan = problem.log_a.new_empty(launch.size * plane, dtype=torch.float16)
    base_a, base_b = torch.empty_like(problem.log_a), torch.empty_like(problem.log_b)
    return StoredPlan(True, base_a, base_b, plan, width, plane)


def _solve_in_one_launch(
    launch: LaunchProblem, f: Tensor, g: Tensor, outputs: tuple[Tensor, ...]
) -> None:
    problem, stored = launch.problem, allocate_plan(launch)
    log_masses = problem.log_a, problem.log_b
    launch_kernel(
        loop_kernel,
        (launch.size,),
        *launch.pointers(),
        *initial_potentials(problem),
        f,
        g,
        *(torch.empty_like(x) for x in (*log_masses, *log_masses)),
        stored.base_a,
        stored.base_b,
        stored.plan,
        *outputs,
        *launch.sizes(),
        stored.width,
        stored.plane,
        problem.max_iter,
        problem.tol,
        1 / problem.rho_a,
        1 / problem.rho_b,
        problem.omega,
        problem.anneal_start,
        problem.anneal_ratio,
        tuning.RESIDENT if launch.packed else 0,
        FAST=stored.fast,
        START=problem.f0 is not None,
        BLOCK=tuning.VECTOR_BLOCK,
        **tile_options(launch, tuning.STREAM),
    )


class StepwiseSolve:
    """A streamed run with many programs per problem, launched half-step by half-step.

    Where the rows of a half-step do not make enough programs to fill a GPU, programs also split
    its columns in segments, and a further launch merges the segments.
    """

    def __init__(
        self, launch: LaunchProblem, f: Tensor, g: Tensor, outputs: tuple[Tensor, ...]
    ) -> None:
        self.launch, self.outputs = launch, outputs
        self.problem = problem = launch.problem
        self.stored = allocate_plan(launch)
        self.potentials = f, g
        # Soft-mins of a half-step, and after the run the marginals of the plan.
        self.results = torch.empty_like(f), torch.empty_like(g)
        # Sums of P * C after the run; scratch memory during it.
        self.cost_sums = torch.empty_like(f), torch.empty_like(g)
        self.starts = initial_potentials(problem)
        self.annealing = annealing_temperatures(problem)
        n_iter = outputs[3]
        self.stopped, self.state = torch.empty_like(n_iter), torch.empty_like(n_iter)
        # Two tensors: each begins at an aligned address, whatever the size of the batch.
        like = problem.epsilon
        self.change, self.column_error = torch.empty_like(like), torch.empty_like(like)
        self.tile = tile_options(launch, tuning.STREAM)
        self.options = {
            "PACKED": launch.packed,
            "START": problem.f0 is not None,
            "BLOCK": tuning.VECTOR_BLOCK,
        }
        self.splits = self._split(launch.n, launch.m), self._split(launch.m, launch.n)
        partial = [
            3 * ceil_div(columns, SEGMENT.value) * x.numel() if split > 1 else 0
            for columns, x, split in zip(
                (launch.m, launch.n), self.potentials, self.splits, strict=True
            )
        ]
        self.partial = f.new_empty(max(1, *partial))
        # By kernel, side and purpose; a launch takes a fraction of the time to prepare it.
        self.launches: dict[tuple[str, bool, bool], RepeatedLaunch] = {}

    def _split(self, n: int, m: int) -> int:
        """The number of programs that share the columns of a half-step over n rows."""
        programs = self.launch.size * self.launch.blocks(n, tuning.STREAM.rows)
        segments = ceil_div(m, SEGMENT.value)
        return 1 if self.stored.fast else min(segments, max(1, tuning.FILLED // programs))

    def run(self) -> None:
        """Run every iteration and write the outputs; stopped problems cost only their launches."""
        problem = self.problem
        self._update(False, 0, init=True)
        self._update(True, 0, init=True)
        for iteration in range(problem.max_iter):
            if self.stored.fast:
                self._store_plan()
            for swapped in (False, True):
                self._reduce(swapped, self.annealing[iteration])
                self._update(swapped, iteration)
        self._reduce(False, sums=True)
        self._reduce(True, sums=True)
        self._write_outputs()

    def _reduce(self, swapped: bool, annealing: float = 0.0, sums: bool = False) -> None:
        """Compute the soft-mins of one side, or the sums of its plan and transport cost."""
        stored, side = self.stored, int(swapped)
        split = 1 if sums else self.splits[side]
        row_count = self.potentials[side].numel()
        key = "walk", swapped, sums
        if key not in self.launches:
            self.launches[key] = self._walk(swapped, sums, split)
        sizes = self.launch.sizes(swapped)
        self.launches[key](*sizes, row_count, stored.width, stored.plane, annealing)
        if split > 1:
            # The numbers of rows and columns of the half-step.
            sizes = sizes[3:5]
            key = "gather", swapped, sums
            if key not in self.launches:
                self.launches[key] = self._gather(swapped, sizes[0])
            self.launches[key](*sizes, row_count, annealing)

    def _walk(self, swapped: bool, sums: bool, split: int) -> RepeatedLaunch:
        launch, stored = self.launch, self.stored
        order = (1, 0) if swapped else (0, 1)
        side = order[0]
        tensors = (
            *launch.pointers(swapped),
            *(self.potentials[i] for i in order),
            self.results[side],
            self.cost_sums[side],
            *((stored.base_a, stored.base_b)[i] for i in order),
            *(stored.plan, self.partial, self.state, self.stopped),
        )
        n = (launch.n, launch.m)[side]
        return RepeatedLaunch(
            walk_kernel,
            (launch.size, launch.blocks(n, tuning.STREAM.rows), split),
            tensors,
            SPLIT=split > 1,
            REDUCE=int(sums),
            ROWS=stored.fast and not swapped,
            FAST=stored.fast and not sums,
            **self.tile,
        )

    def _gather(self, swapped: bool, n: int) -> RepeatedLaunch:
        """Prepare the launch that merges the segments of a half-step over n rows."""
        launch = self.launch
        offsets = (launch.cu_b, launch.cu_a) if swapped else (launch.cu_a, launch.cu_b)
        tensors = (self.problem.epsilon, self.partial, self.results[swapped], self.stopped)
        return RepeatedLaunch(
            gather_kernel,
            (launch.size, launch.blocks(n, tuning.VECTOR_BLOCK)),
            (*offsets, *tensors),
            PACKED=launch.packed,
            BLOCK=tuning.VECTOR_BLOCK,
        )

    def _update(self, swapped: bool, iteration: int, init: bool = False) -> None:
        """Update the potentials of one side, or set them to their start with ``init``."""
        launch, problem, side = self.launch, self.problem, int(swapped)
        key = "turn", swapped, init
        if key not in self.launches:
            self.launches[key] = self._turn(swapped, init)
        self.launches[key](
            (launch.n, launch.m)[side],
            iteration,
            problem.max_iter - 1 - iteration,
            problem.tol,
            1 / (problem.rho_a, problem.rho_b)[side],
            problem.omega,
            self.annealing[iteration],
            # The first iteration has no predecessor, so it measures no marginal error.
            self.annealing[iteration - 1] if iteration else math.inf,
        )

    def _turn(self, swapped: bool, init: bool) -> RepeatedLaunch:
        launch, problem, side = self.launch, self.problem, int(swapped)
        tensors = (
            (launch.cu_a, launch.cu_b)[side],
            (problem.log_a, problem.log_b)[side],
            problem.epsilon,
            self.starts[side],
            self.potentials[side],
            self.results[side],
            (self.stored.base_a, self.stored.base_b)[side],
            *(self.state, self.change, self.column_error, self.stopped, self.outputs[3]),
        )
        return RepeatedLaunch(
            turn_kernel,
            (launch.size,),
            tensors,
            ROWS=not swapped,
            FAST=self.stored.fast,
            INIT=init,
            **self.options,
        )

    def _store_plan(self) -> None:
        launch, stored = self.launch, self.stored
        key = "keep", False, False
        if key not in self.launches:
            tensors = (stored.base_a, stored.base_b, stored.plan, self.state, self.stopped)
            self.launches[key] = RepeatedLaunch(
                keep_kernel,
                (launch.size, launch.blocks(launch.n, tuning.STREAM.rows)),
                (*launch.pointers(), *tensors),
                **self.tile,
            )
        self.launches[key](*launch.sizes(), stored.width, stored.plane)

    def _write_outputs(self) -> None:
        launch, problem = self.launch, self.problem
        launch_kernel(
            finish_kernel,
            (launch.size,),
            launch.cu_a,
            launch.cu_b,
            problem.log_a,
            problem.log_b,
            problem.epsilon,
            *self.starts,
            *self.potentials,
            *self.results,
            *self.cost_sums,
            *self.outputs,
            launch.n,
            launch.m,
            problem.max_iter,
            problem.tol,
            1 / problem.rho_a,
            1 / problem.rho_b,
            **self.options,
        )
