"""Random calls of fuzz.py for the kernels of GPUs, on one where there is one.

    python tests/fuzz_kernels.py cuda --calls 1000 --seconds 300 --seed 0
    python tests/fuzz_kernels.py triton --seconds 300
    python tests/fuzz_kernels.py streamed --seconds 300

Without a GPU the CUDA kernels run as in test_cuda_host.py, compiled for the CPU, and those of
Triton in its interpreter, on fewer and shorter problems. ``streamed`` gives Triton's kernels for
sides that do not stay on chip sides of any length.
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import fuzz
import torch

from optical.backends.registry import BackendUnsupported

NAMES = ("cuda", "triton", "streamed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use(name: str) -> None:
    """Makes the kernels of that name run here."""
    if name == "cuda":
        if DEVICE == "cpu":
            _compile_for_the_cpu()
        return
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from optical.kernels import tuning

    if name == "streamed":
        # One pair stays on chip, and one program runs each problem unless there is one alone.
        # The plan is kept in half precision for short runs too.
        tuning.RESIDENT, tuning.PROGRAMS, tuning.OBLONG, tuning.KEPT_ITERATIONS = 1, 1, (), 4
        for table in ("TILES", "ROOMY", "ADJOINT"):
            setattr(tuning, table, {1: getattr(tuning, table)[16]})
    if DEVICE == "cpu":
        from tests.kernels.interpreted import patch_once

        patch_once(setattr)


def _compile_for_the_cpu() -> None:
    import test_cuda_host

    from optical.backends import library

    with tempfile.TemporaryDirectory() as folder:
        kernels = library.open_library(test_cuda_host.build(Path(folder), "-O1"), None)
    test_cuda_host.use(kernels, setattr)


class Dice(fuzz.Dice):
    """Now and then a side that takes several warps, blocks or tiles."""

    def size(self) -> int:
        return self.between(65, self.pick(130, 260)) if self.chance(0.05) else super().size()


def draw(name: str, seed: int) -> fuzz.Call:
    """The first valid call in float32 that the dice of this number give."""
    # Triton's interpreter would take minutes for long sides.
    interpreted = name != "cuda" and DEVICE == "cpu"
    dice = fuzz.Dice(seed) if interpreted else Dice(seed)
    backend = "cuda" if name == "cuda" else "triton"
    while True:
        call = replace(fuzz.draw_valid(dice).but(backend=backend), threads=1, device=DEVICE)
        long = len(call.cotangents["value"]) > 3 or call.arguments["max_iter"] > 12
        if call.dtype == torch.float32 and not (interpreted and long):
            return call


def main() -> int:
    if sys.argv[1:2] not in [[name] for name in NAMES]:
        sys.exit(f"{sys.argv[0]}: expected {', '.join(NAMES[:-1])} or {NAMES[-1]} first")
    name = sys.argv.pop(1)
    use(name)
    sys.argv[0] += f" {name}"
    served = {True: 0, False: 0}

    def check(call: fuzz.Call) -> None:
        try:
            fuzz.check(call)
            served[True] += 1
        except BackendUnsupported:
            served[False] += 1

    failed = fuzz.main(sys.argv[1:], lambda seed: draw(name, seed), check)
    print(f"{served[False]} of the calls were refused")
    return failed or int(served[False] > served[True])


if __name__ == "__main__":
    sys.exit(main())
