"""Random calls of the public functions, each drawn from its seed alone.

    python -m tests.stress --calls 100000 --seconds 300 --seed 0

A valid call must agree with the float64 reference by the rule of ``tests.stress.allowances``. An
invalid call must raise an error that names the invalid argument. No call may crash or hang. Each
failure is printed with the command that repeats it.
"""

import sys

from tests.stress.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
