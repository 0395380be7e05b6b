"""Which tile serves which problem, from its shape alone, and with how many warps.

Nothing here is tuned at run time: texts have every length, and a search per length would cost
seconds each. The numbers come from compiling every entry for every target and reading registers and
instructions off the machine code (``tests/test_triton_compile.py``); no entry was timed on a GPU.
"""

from typing import NamedTuple

# The longest side of a problem that stays on chip; larger ones are OBLONG or streamed.
RESIDENT = 128
# How many iterations on chip pass between two looks at how far they have gone.
STEPS = 4


class Tile(NamedTuple):
    """A tile of rows x columns entries and how its threads share it.

    ``part``: the rows of one dot. ``depth``: how many entries of the vectors are read at a time.
    ``warps_n`` x ``warps_m``: the warps along rows and columns where the cost is stored.
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


# AMD's warps have 64 lanes, and four of them share a program with 512 registers for each lane; more
# warps would have 256.
AMD_WARPS = 4

# The tiles on chip by the longest side they hold.
TILES = {
    16: Tile(16, 16, 32, 16, 1, 1, 2),
    32: Tile(32, 32, 32, 32, 1, 1, 2),
    64: Tile(64, 64, 32, 32, 1, 1, 2),
    128: Tile(128, 128, 32, 32, 2, 2, 2),
}

# Tiles on chip for padded problems with one long side, where nothing more has to be remembered.
OBLONG = (Tile(128, 256, 32, 32, 2, 4, 2), Tile(256, 128, 32, 32, 4, 2, 2))

# As TILES with fewer entries per thread, for runs with more to remember: float32 vectors, whose
# products take three dots, penalties, over-relaxation and annealing.
ROOMY = TILES | {
    64: Tile(64, 64, 32, 32, 2, 1, 2),
    128: Tile(128, 128, 32, 32, 4, 2, 2),
}
# The tiles of the system behind implicit gradients, whose sums are float64.
ADJOINT = {
    16: Tile(16, 16, 32, 16, 1, 1, 2),
    32: Tile(32, 32, 32, 32, 1, 1, 2),
    64: Tile(64, 64, 32, 32, 2, 2, 2),
    128: Tile(128, 128, 32, 32, 4, 2, 2),
}


class GradientTile(NamedTuple):
    """A tile of a gradient to vectors: ``pull`` of their entries are pulled at a time.

    ``whole``: the columns of the tile are all that there are.
    """

    rows: int
    columns: int
    depth: int
    pull: int
    whole: bool
    warps: int
    stages: int


def gradient_tiles(columns: int, packed: bool, single: bool) -> list[tuple[GradientTile, int, int]]:
    """Tiles to launch and from how many to how many columns each serves, given the most there are.

    Packed problems may have any number of columns up to that. ``single``: the products are those of
    float32 numbers, which take three times the registers.
    """
    whole, partial = (SINGLE, SINGLE_PARTIAL) if single else (WHOLE, PARTIAL)
    fitting = next((most for most in whole if columns <= most), None)
    if not packed:
        return [(whole[fitting] if fitting else partial, 0, columns)]
    sides = [most for most in whole if fitting is None or most <= fitting]
    tiles = [(whole[most], 0 if most == sides[0] else most // 2 + 1, most) for most in sides]
    return tiles if fitting else [*tiles, (partial, sides[-1] + 1, columns)]


# By the number of columns that they hold.
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
# Tiles of kernels that sum over the columns of a plan.
WALK = Tile(64, 64, 32, 64, 2, 2, 2)
# The tile of problems that are streamed.
STREAM = Tile(64, 64, 32, 64, 2, 2, 2)
# Of the system behind their implicit gradients; for products of float32 numbers and for others.
ADJOINT_STREAM = {True: Tile(32, 32, 32, 32, 2, 2, 2), False: Tile(64, 64, 32, 64, 4, 2, 2)}
# So many problems keep a GPU busy with one program each; fewer are shared out, launch by launch.
PROGRAMS = 128
# So many programs fill the largest GPU; walks of fewer share the columns of a problem out as well.
FILLED = 256
# From so many iterations on a plan in half precision is worth being written down.
KEPT_ITERATIONS = 8
# How many lines of a side are looked at together between two walks.
LINES = 256
