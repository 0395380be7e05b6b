"""Entry point of ``optical``, ``python -m optical`` and ``python -m optical.cli``."""

import os
import signal
import sys
from types import FrameType


def run() -> int:
    """Run the command line in a process of its own; an interrupt at any moment is one line.

    While modules are imported nothing has been written, and an exception could be lost in a
    callback of an import or of a library. The process therefore ends at once. `main` then handles
    interrupts of the command itself.
    """
    # A shell lets its background jobs ignore the signal.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        from optical.cli.main import main

        return main()
    signal.signal(signal.SIGINT, _stop)
    from optical.cli.main import main

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exit_code = main()
        # The command is done. Python's handler would write a traceback while it shuts down.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:  # outside of the part that `main` guards
        exit_code = 130
    return exit_code


def _stop(number: int, frame: FrameType | None) -> None:
    """End the process, whatever it is importing."""
    os.write(2, b"interrupted; nothing was written\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(run())
