"""Entry point of ``python -m optical``."""

import sys

from optical.cli.__main__ import run

if __name__ == "__main__":
    sys.exit(run())
