"""The driver of random calls: counts them, stops in time, prints how to repeat a failure."""

from __future__ import annotations

import argparse
import faulthandler
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence

from optical.backends import library
from tests.stress.calls import Call
from tests.stress.check import check
from tests.stress.draw import draw

PROGRAM = "python -m tests.stress"
HANG = 600  # seconds for one call, on a machine that other programs may share


def main(
    arguments: Sequence[str],
    draw: Callable[[int], Call] = draw,
    check: Callable[[Call], None] = check,
    program: str = PROGRAM,
) -> int:
    """Check calls until their number, the time or the number of failures is reached.

    Args:
        arguments: command-line arguments.
        draw: makes the call of a seed.
        check: raises an exception if a call misbehaves.
        program: the command line that repeats a failure, but for the seed.

    Returns:
        The exit status: 1 if any call failed.
    """
    options = _parse(arguments, program)
    warnings.simplefilter("ignore")  # the reference replaces the library where it must
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # a crash keeps the failures printed so far
    start = time.monotonic()
    done = failures = 0
    for seed in range(options.seed, options.seed + options.calls):
        if time.monotonic() - start > options.seconds or failures == options.failures:
            break
        # After a crash, the last number on the terminal is the seed of the call.
        print(f"\r{seed}", end="", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        call = draw(seed)
        done += 1
        try:
            check(call)
        except Exception:
            failures += 1
            print(f"\nFAILED: {program} --seed {seed} --calls 1\n{call}")
            traceback.print_exc(limit=-4, file=sys.stdout)
    faulthandler.cancel_dump_traceback_later()
    elapsed = time.monotonic() - start
    print(f"\n{done} calls, {failures} failed, {elapsed:.0f} s")
    return 1 if failures else 0


def _parse(arguments: Sequence[str], program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program, description="Check random calls of the public functions."
    )
    parser.add_argument("--calls", type=int, default=100_000, help="number of calls")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call")
    parser.add_argument("--failures", type=int, default=10, help="failures after which to stop")
    options = parser.parse_args(arguments)
    reason = library.load_cpu().reason  # builds the library on first use
    if reason is not None:
        parser.error(f"there is no library to compare: {reason}")
    return options
