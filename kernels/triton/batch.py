"""The batch of problems in the form the kernels take, and its tiles."""

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor

import triton.language as tl
from optical.backends.problem import Problem
from optical.kernels import tuning
from optical.kernels.launch import KeptLaunch, launch_kernel
from optical.kernels.tokens.norms import Norms, centre_kernel, norm_kernel

KINDS = {"given": 0, "cosine": 1, "sqeuclidean": 2, "dot": 3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def ceil_div(size: int, block: int) -> int:
    """The number of blocks that cover ``size``. (``triton.cdiv`` takes microseconds.)"""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()


class Layout:
    """A batch without its tensors, as the host knows it; batches of the same shapes share one.

    Attributes:
        size: number of problems.
        n, m: number of rows and columns, padding included; for packed problems the totals.
        dim: length of a token vector, 0 for a given cost.
        strides: strides of a given cost.
        single: a side has float32 vectors, or the cost is given.
        precision: ``input_precision`` of the dots of the cost, whose operands are float32, or
            "half" where both sides have the same half-precision dtype.
        exact: ``input_precision`` that multiplies float32 numbers without significant loss, by
            three TF32 products on NVIDIA.
        scaled: vectors are multiplied by a power of two before they are used.
        wide: offsets within a problem need 64 bits.
    """

    def __init__(
        self,
        kind: str,
        packed: bool,
        sizes: tuple[int, int, int],
        dim: int,
        dtypes: tuple[torch.dtype, ...],
        strides: tuple[int, ...],
    ) -> None:
        self.packed, self.dim, self.strides = packed, dim, strides
        self.size, self.n, self.m = sizes
        self.kind = KINDS[kind]
        self.nvidia = torch.version.hip is None and not INTERPRETED
        self.single = torch.float32 in dtypes
        self.exact = "tf32x3" if self.nvidia else "ieee"
        self.precision = self._precision(set(dtypes))
        self.scaled = kind == "cosine" and self.single
        extent = max(self.n, self.m) * max(1, dim)
        if kind == "given":
            extent = self.n * strides[1] + self.m * strides[2]
        self.wide = extent >= 2**31

    def _precision(self, dtypes: set[torch.dtype]) -> str:
        """The precision of the dots of the cost, from the dtypes of both sides.

        Products of half-precision numbers are exact, and so are those of TF32, which holds every
        number of both half-precision dtypes.
        """
        if self.kind == KINDS["given"]:
            return "ieee"
        if self.single or self.kind == KINDS["sqeuclidean"]:
            return self.exact
        # Triton's interpreter multiplies the bits of bfloat16 as integers.
        if len(dtypes) == 1 and not INTERPRETED:
            return "half"
        return "tf32" if self.nvidia else "ieee"

    def gradient_dot(self, *dtypes: torch.dtype) -> dict[str, Any]:
        """The compile-time options of the dots of gradients of these dtypes.

        Gradients are rounded to the dtype of their vectors, so their weights need no more digits:
        TF32 holds every float16, and weights in float16 would underflow.
        """
        if not self.nvidia or torch.float32 in dtypes:
            dot = tl.float32, self.exact
        elif torch.float16 in dtypes:
            dot = tl.float32, "tf32"
        else:
            dot = tl.bfloat16, "ieee"
        return {"DOT_DTYPE": dot[0], "DOT_PRECISION": dot[1]}

    def sizes(self, swapped: bool = False) -> tuple[int, ...]:
        """The strides of a given cost, the numbers of rows and columns, and the vector length."""
        batch, row, column = self.strides
        if swapped:
            return batch, column, row, self.m, self.n, self.dim
        return batch, row, column, self.n, self.m, self.dim

    def warps(self, tuned: int) -> int:
        """The number of warps per program on this device, where a tuning table has ``tuned``."""
        return tuned if torch.version.hip is None else min(tuned, tuning.AMD_WARPS)

    def blocks(self, size: int, block: int) -> int:
        """The number of programs that share ``size`` rows or columns of a problem.

        It is capped for packed problems, where ``size`` is the total of the batch.
        """
        count = ceil_div(size, block)
        return count if not self.packed else min(count, max(1, 1024 // self.size))

    @functools.cached_property
    def norm_launch(self) -> KeptLaunch:
        """The launch that computes the norms of both sides."""
        block = 16
        # The host does not know the lengths of packed problems, so programs stride over tokens.
        most = max(1, 4096 // self.size)
        parts, parts_y = (min(ceil_div(size, block), most) for size in (self.n, self.m))
        return KeptLaunch(
            norm_kernel,
            (self.size, parts + parts_y),
            *(self.n, self.m, self.dim, parts),
            KIND=self.kind,
            PACKED=self.packed,
            SCALED=self.scaled,
            BLOCK_T=block,
            BLOCK_D=max(16, min(128, next_power_of_2(self.dim))),
        )


@functools.lru_cache(maxsize=4096)
def _layout(
    kind: str,
    packed: bool,
    epsilon: torch.Size,
    log_a: torch.Size,
    log_b: torch.Size,
    dim: int,
    dtypes: tuple[torch.dtype, ...],
    strides: tuple[int, ...],
) -> Layout:
    """The layout of a batch, from the shapes of its temperatures and log-masses."""
    return Layout(kind, packed, (epsilon[0], log_a[-1], log_b[-1]), dim, dtypes, strides)


class LaunchProblem(Layout):
    """A batch of problems in the form the kernels take: its layout, pointers and token norms.

    Attributes:
        problem: the problems and their options.
        layout: what other batches share.
        norms: those of the tokens; computed, unless an earlier launch problem's are given.
    """

    def __init__(self, problem: Problem, norms: Norms | None = None) -> None:
        self.problem = problem
        x, y, unused = problem.x, problem.y, problem.epsilon
        about: tuple[Any, ...] = 0, (x.dtype,), x.stride()
        if y is not None:
            about = x.shape[-1], (x.dtype, y.dtype), (0, 0, 0)
        shapes = unused.shape, problem.log_a.shape, problem.log_b.shape
        self.layout = _layout(problem.kind, problem.cu_a is not None, *shapes, *about)
        self.__dict__.update(self.layout.__dict__)
        # Kernels ignore these pointers unless the kind of cost uses them; any tensor serves.
        self.y = unused if y is None else y
        self.cu_a = unused if problem.cu_a is None else problem.cu_a
        self.cu_b = unused if problem.cu_b is None else problem.cu_b
        if norms is not None:
            self.norms = norms
        elif problem.kind in ("cosine", "sqeuclidean"):
            self.norms = self._norms(self._centre() if problem.kind == "sqeuclidean" else unused)
        else:
            self.norms = Norms(*[unused] * 5)

    def _centre(self) -> Tensor:
        problem = self.problem
        centre, block = torch.empty(self.size, self.dim, device=problem.x.device), 64
        launch_kernel(
            centre_kernel,
            (self.size, ceil_div(self.dim, block)),
            problem.x,
            self.y,
            self.cu_a,
            self.cu_b,
            problem.log_a,
            problem.log_b,
            centre,
            self.n,
            self.m,
            self.dim,
            PACKED=self.packed,
            BLOCK_T=32,
            BLOCK_D=block,
        )
        return centre

    def _norms(self, centre: Tensor) -> Norms:
        problem = self.problem
        norms = torch.empty_like(problem.log_a), torch.empty_like(problem.log_b)
        scales = [torch.empty_like(x) for x in norms] if self.scaled else norms
        tensors = problem.x, self.y, self.cu_a, self.cu_b, centre, *norms, *scales
        self.layout.norm_launch(*tensors)
        return Norms(centre, *norms, *scales)

    def pointers(self, swapped: bool = False) -> tuple[Tensor, ...]:
        """The tensors from which cost tiles are computed, in the order of the kernels' parameters.

        ``swapped`` exchanges rows and columns.
        """
        problem, (centre, norm_a, norm_b, scale_a, scale_b) = self.problem, self.norms
        x, y = problem.x, problem.x if problem.y is None else problem.y
        log_a, log_b, last = problem.log_a, problem.log_b, problem.epsilon
        if swapped:
            tokens = y, x, norm_b, norm_a, scale_b, scale_a
            return *tokens, centre, self.cu_b, self.cu_a, log_b, log_a, last
        tokens = x, y, norm_a, norm_b, scale_a, scale_b
        return *tokens, centre, self.cu_a, self.cu_b, log_a, log_b, last


def choose_tiles(launch: Layout, table: dict[int, tuning.Tile]) -> list[tuple[int, tuning.Tile]]:
    """List the tiles to launch, each with the longest side it serves.

    Padded problems need one tile, or none where the problem is too large. Packed problems, whose
    lengths the host does not know, need every tile up to the largest that may occur.
    """
    longest = max(launch.n, launch.m)
    if table is tuning.TILES and longest > tuning.RESIDENT and not launch.packed:
        for tile in tuning.OBLONG:
            if launch.n <= tile.rows and launch.m <= tile.columns:
                return [(longest, tile)]
    fitting = [(side, tile) for side, tile in table.items() if side >= longest]
    if not launch.packed:
        return fitting[:1]
    last = fitting[0][0] if fitting else max(table)
    return [(side, tile) for side, tile in table.items() if side <= last]


def onchip_table(launch: LaunchProblem, table: dict[int, tuning.Tile]) -> dict[int, tuning.Tile]:
    """The table of tiles of the iterations, without the smallest ones for implicit gradients."""
    least = tuning.IMPLICIT_SIDE if launch.problem.gradient == "implicit" else 0
    if not launch.packed and max(launch.n, launch.m) >= least:
        return table
    return {side: tile for side, tile in table.items() if side >= least} or table


def initial_potentials(problem: Problem) -> tuple[Tensor, Tensor]:
    """``f0`` and ``g0``, or placeholders where the run starts from zero."""
    unused = problem.epsilon
    return (
        unused if problem.f0 is None else problem.f0,
        unused if problem.g0 is None else problem.g0,
    )


def annealing_temperatures(problem: Problem) -> list[float]:
    """The annealing temperature of each iteration, with the bits of the kernels.

    Kernels that run all iterations multiply float32 numbers, so each product is rounded here, too.
    """
    if not problem.anneal_start:
        return [0.0] * max(1, problem.max_iter)
    temperature, ratio = (
        ctypes.c_float(x).value for x in (problem.anneal_start, problem.anneal_ratio)
    )
    temperatures = []
    for _ in range(max(1, problem.max_iter)):
        temperatures.append(temperature)
        temperature = ctypes.c_float(temperature * ratio).value
    return temperatures


def cost_options(launch: Layout) -> dict[str, Any]:
    """The compile-time options of every kernel that computes costs."""
    return _cost_options(launch.kind, launch.packed, launch.scaled, launch.wide, launch.precision)


def tile_options(launch: Layout, tile: tuning.Tile) -> dict[str, Any]:
    """The compile-time options of a kernel that computes tiles of the cost in ``tile``."""
    cost = launch.kind, launch.packed, launch.scaled, launch.wide, launch.precision
    return _tile_options(cost, tile, launch.warps(tile.warps))


# Callers only unpack these dictionaries.
@functools.lru_cache(maxsize=256)
def _cost_options(
    kind: int, packed: bool, scaled: bool, wide: bool, precision: str
) -> dict[str, Any]:
    return {
        "KIND": kind,
        "PACKED": packed,
        "SCALED": scaled,
        "WIDE": wide,
        "PRECISION": precision,
    }


@functools.lru_cache(maxsize=256)
def _tile_options(cost: tuple[Any, ...], tile: tuning.Tile, warps: int) -> dict[str, Any]:
    return _cost_options(*cost) | {
        "BLOCK_N": tile.rows,
        "BLOCK_M": tile.columns,
        "BLOCK_D": tile.depth,
        "WARPS_N": tile.warps_n,
        "WARPS_M": tile.warps_m,
        "num_warps": warps,
        "num_stages": tile.stages,
    }
