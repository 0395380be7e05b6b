"""Entry point of ``python -m optical.cli``."""

import sys

from optical.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
