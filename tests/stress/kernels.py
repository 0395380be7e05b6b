"""Random calls of the GPU kernels, on a GPU if there is one.

    python -m tests.stress.kernels cuda --calls 1000 --seconds 300 --seed 0
    python -m tests.stress.kernels triton --seconds 300
    python -m tests.stress.kernels streamed --seconds 300
    python -m tests.stress.kernels triton-ptx --seconds 300

Without a GPU, the CUDA kernels are compiled for the CPU by the emulator of ``test_cuda_host``, and
the Triton kernels run in Triton's interpreter, on fewer and shorter problems. ``streamed`` runs the
Triton kernels for sides that do not fit on chip on sides of any length. ``triton-ptx`` runs the
compiled Triton kernels on the machine of ``tests.kernels.ptx``, which also reports races.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from optical.backends.registry import BackendUnsupported
from tests.stress import draw as valid
from tests.stress.calls import Call
from tests.stress.check import check
from tests.stress.run import main

NAMES = ("cuda", "triton", "streamed", "triton-ptx")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use(name: str) -> None:
    """Make the kernels of this name run on the present machine."""
    if name == "cuda":
        if DEVICE == "cpu":
            _compile_for_the_cpu()
        return
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from optical.kernels import tuning

    if name == "streamed":
        # A single pair stays on chip; one program per problem unless the batch has only one; short
        # runs keep the plan in half precision too.
        tuning.RESIDENT, tuning.PROGRAMS, tuning.OBLONG, tuning.KEPT_ITERATIONS = 1, 1, (), 4
        for table in ("TILES", "ROOMY", "UNROLLED", "ADJOINT"):
            setattr(tuning, table, {1: next(iter(getattr(tuning, table).values()))})
    if DEVICE == "cpu":
        from tests.kernels.interpreted import patch_once

        patch_once(setattr)


def _compile_for_the_cpu() -> None:
    from optical.backends import library
    from tests.cuda_emulator import build as emulator

    with tempfile.TemporaryDirectory() as folder:
        emulated = library.open_library(emulator.build(Path(folder), "-O1"), None)
    emulator.use(emulated, setattr)


class Dice(valid.Dice):
    """Dice that make one side in twenty span several warps, blocks or tiles."""

    def size(self) -> int:
        return self.between(65, self.pick(130, 260)) if self.chance(0.05) else super().size()


def draw(name: str, seed: int) -> Call:
    """The first valid float32 call drawn from this seed."""
    # Long sides and runs would take minutes in Triton's interpreter.
    interpreted = name == "triton-ptx" or (name != "cuda" and DEVICE == "cpu")
    dice = valid.Dice(seed) if interpreted else Dice(seed)
    backend = "cuda" if name == "cuda" else "triton"
    while True:
        device = "cpu" if name == "triton-ptx" else DEVICE
        call = replace(valid.draw_valid(dice).but(backend=backend), threads=1, device=device)
        long = call.batch > 3 or call.arguments["max_iter"] > 12
        if call.dtype == torch.float32 and not (interpreted and long):
            return call


def run(arguments: Sequence[str]) -> int:
    """Check random calls of the kernels named by the first argument; returns the exit status."""
    name, *options = arguments or [""]
    if name not in NAMES:
        sys.exit(f"the first argument is {name!r}; expected {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if name == "triton-ptx":
        from tests.kernels.ptx.driver import NOISY_UNITS, TRUNCATED_SUMS, TritonMachine

        noise = NOISY_UNITS | TRUNCATED_SUMS
        with (
            tempfile.TemporaryDirectory() as folder,
            TritonMachine(Path(folder), noise=noise) as machine,
        ):
            return _check_calls(name, options, machine.messages)
    use(name)
    return _check_calls(name, options, [])


def _check_calls(name: str, options: Sequence[str], messages: list[str]) -> int:
    """Check random calls; ``messages`` of the PTX machine fail the call that caused them."""
    served = {True: 0, False: 0}

    def check_served(call: Call) -> None:
        messages.clear()
        try:
            check(call)
            assert not messages, messages[0]
            served[True] += 1
        except BackendUnsupported:
            served[False] += 1

    program = f"python -m tests.stress.kernels {name}"
    status = main(options, lambda seed: draw(name, seed), check_served, program)
    print(f"{served[False]} of the calls were refused")
    return status or int(served[False] > served[True])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
