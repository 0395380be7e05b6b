"""Which tile serves which problem, from its shape alone, and with how many warps.

Nothing here is tuned at run time: texts have every length, and a search per length would cost
seconds each. The numbers come from compiling every entry for every target and reading registers and
instructions off the machine code (``tests/test_triton_compile.py``); no entry was timed on a GPU.
"""

from typing import NamedTuple

# The longest side of a problem that stays on chip; the larger ones are streamed.
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


# The tiles on chip by the longest side they hold.
TILES = {
    16: Tile(16, 16, 32, 16, 1, 1, 2),
    32: Tile(32, 32, 32, 32, 1, 1, 2),
    64: Tile(64, 64, 32, 32, 1, 1, 2),
    128: Tile(128, 128, 32, 32, 2, 2, 2),
}
