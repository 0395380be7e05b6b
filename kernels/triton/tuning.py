"""Tile sizes, warps and pipeline stages of the Triton kernels, by the shape of a problem alone.

Nothing is tuned at run time: text lengths vary freely, and a search per length would cost seconds
each. The entries were chosen by compiling each of them for every target and reading registers and
instruction counts off the machine code (``tests/kernels/test_compile.py``). None was timed on a
GPU.
"""

from typing import NamedTuple

# Longest side of a problem whose plan stays in registers; larger ones are OBLONG or streamed.
RESIDENT = 128
# Scaling iterations between two checks of how far the scalings have drifted.
STEPS = 4


class Tile(NamedTuple):
    """A tile of rows x columns entries and its distribution over threads.

    ``part``: rows of one dot. ``depth``: vector entries read at a time. ``warps_n`` x ``warps_m``:
    warps along rows and columns where the cost is loaded from memory.
    """

    rows: int
    columns: int
    depth: int
    part: int
    warps_n: int
    warps_m: int
    stages: int

    @property
    def warps(self) -> int:
        return self.warps_n * self.warps_m


# AMD's warps have 64 lanes. Up to four of them share a program with 512 registers per lane; with
# more warps a lane would have 256.
AMD_WARPS = 4

# Tiles of problems that stay in registers, by the longest side they hold.
TILES = {
    16: Tile(16, 16, 32, 16, 1, 1, 2),
    32: Tile(32, 32, 32, 32, 1, 1, 2),
    64: Tile(64, 64, 32, 32, 1, 1, 2),
    128: Tile(128, 128, 32, 32, 2, 2, 2),
}

# The same for padded problems with one long side, where the kernel has no further state to hold.
OBLONG = (Tile(128, 256, 32, 32, 2, 4, 2), Tile(256, 128, 32, 32, 4, 2, 2))

# TILES with fewer entries per thread, for runs with more state: float32 vectors, whose products
# take three dots, penalties, over-relaxation and annealing.
ROOMY = TILES | {
    64: Tile(64, 64, 32, 32, 2, 1, 2),
    128: Tile(128, 128, 32, 32, 4, 2, 2),
}
# Tiles of the reverse sweep of unrolled gradients.
UNROLLED = TILES | {
    64: Tile(64, 64, 32, 32, 2, 2, 2),
    128: Tile(128, 128, 32, 32, 4, 2, 2),
}
# Tiles of the linear system behind implicit gradients, whose sums are float64, and the smallest
# side of the iterations before it. A training on texts of all lengths compiles every tile of both,
# so these leave the smallest ones out.
ADJOINT = {side: UNROLLED[side] for side in (64, 128)}
IMPLICIT_SIDE = 32


class GradientTile(NamedTuple):
    """A tile of a vector gradient, multiplied with ``entries`` vector entries at a time.

    ``whole``: the tile spans all columns of the problem.
    """

    rows: int
    columns: int
    depth: int
    entries: int
    whole: bool
    warps: int
    stages: int


def gradient_tiles(columns: int, packed: bool, single: bool) -> list[tuple[GradientTile, int, int]]:
    """List the tiles to launch, each with the smallest and largest number of columns it serves.

    Args:
        columns: the largest number of columns of a problem.
        packed: each problem may have any number of columns up to ``columns``.
        single: the vectors are float32, whose products take three times the registers.
    """
    whole, partial = (SINGLE, SINGLE_PARTIAL) if single else (WHOLE, PARTIAL)
    fitting = next((most for most in whole if columns <= most), None)
    if not packed:
        return [(whole[fitting] if fitting else partial, 0, columns)]
    sides = [most for most in whole if fitting is None or most <= fitting]
    tiles = [(whole[most], 0 if most == sides[0] else most // 2 + 1, most) for most in sides]
    return tiles if fitting else [*tiles, (partial, sides[-1] + 1, columns)]


# Gradient tiles by the number of columns they hold.
WHOLE = {
    32: GradientTile(32, 32, 32, 64, True, 4, 2),
    64: GradientTile(64, 64, 32, 64, True, 8, 2),
    128: GradientTile(64, 128, 32, 64, True, 8, 2),
}
PARTIAL = GradientTile(64, 64, 32, 128, False, 8, 2)
SINGLE = {
    32: GradientTile(32, 32, 32, 32, True, 4, 2),
    64: GradientTile(32, 64, 32, 32, True, 8, 2),
    128: GradientTile(16, 128, 16, 32, True, 4, 2),
}
SINGLE_PARTIAL = GradientTile(32, 64, 16, 64, False, 8, 2)
# Tile of the kernels that sum over the columns of a plan.
PLAN_PRODUCT = Tile(64, 64, 32, 64, 2, 2, 2)
# Tile of a plan that is written to memory.
PLAN = Tile(32, 64, 32, 32, 2, 2, 2)
# Tile of streamed problems.
STREAM = Tile(64, 64, 32, 64, 2, 2, 2)
# Tiles of their linear systems behind implicit gradients; True: products of float32 vectors.
ADJOINT_STREAM = {True: Tile(32, 32, 32, 32, 2, 2, 2), False: Tile(64, 64, 32, 64, 4, 2, 2)}
# Number of problems from which one program per problem keeps a GPU busy. Fewer problems are split
# over many programs, with two launches per half-step.
PROGRAMS = 128
# Half-steps with fewer programs also split the columns. Registers and shared memory of a streamed
# tile let four programs of four warps share a multiprocessor, and an H200 has 132 of these.
FILLED = 4 * 132
# Fewest iterations for which storing the plan in half precision pays off.
KEPT_ITERATIONS = 8
# Rows or columns that the kernels of potentials process at a time.
VECTOR_BLOCK = 256
