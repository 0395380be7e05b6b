"""The measuring process: imports PyTorch once and runs one step per line of standard input.

A request is a line of JSON: {"step": "times", "shape": "T3", "seconds": 60}. The answer is a line
with the exit code of the step; everything else goes to standard error, the log. ``--once`` runs a
single request instead, for a profiler around this process.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.measure import ours, paths, peers
from benchmarks.gpu.measure.rows import RowFile
from benchmarks.gpu.measure.shapes import MACHINE, Shape
from benchmarks.gpu.runner import WRONG_ROWS

STEPS: dict[str, Callable[[Shape, RowFile, float, Path], None]] = {
    "times": ours.times,
    "gradients": ours.gradients,
    "tune": ours.tune,
    "warm": ours.warm,
    "once": ours.once,
    "peers": peers.times,
    "first-use": paths.first_use,
    "nvrtc": paths.nvrtc,
    "host": paths.host,
}


def run(request: dict[str, Any], rows: RowFile, folder: Path) -> int:
    """Run one request; 0, ``WRONG_ROWS``, or 1 after an exception, which is logged."""
    seconds, failures = float(request["seconds"]), rows.failures
    # Where a step hangs is known from the log, if the process is killed at its limit.
    faulthandler.dump_traceback_later(max(1.0, seconds - 1), exit=False)
    try:
        shape = MACHINE.shapes[request.get("shape", "T3")]
        # Leaves time for the variant that runs when the soft limit passes.
        STEPS[request["step"]](shape, rows, time.monotonic() + 0.8 * seconds, folder)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return WRONG_ROWS if rows.failures > failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="CSV file of the rows")
    parser.add_argument("--work", type=Path, required=True, help="folder of the builds")
    parser.add_argument("--once", type=json.loads, metavar="REQUEST", help="run one request")
    parser.add_argument("--rehearse", action="store_true", help="use stand-ins for the device")
    parser.add_argument(
        "--idle-driver", action="store_true", help="compile Triton kernels, and launch nothing"
    )
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if args.rehearse or args.idle_driver:
        from benchmarks.gpu import rehearsal

        if args.idle_driver:
            rehearsal.use_idle_driver(args.rehearse)
        else:
            rehearsal.install(args.work)
    rows = RowFile(args.rows)
    if args.once:
        return run(args.once, rows, args.rows.parent)
    for line in sys.stdin:
        print(run(json.loads(line), rows, args.rows.parent), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
