"""Random calls against a library built with the address and undefined-behaviour sanitizers.

    python tests/sanitize.py --calls 1000

The library is built into build/sanitized from the sources at hand. The sanitizers must be loaded
before everything else, so the program starts itself again with them.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import fuzz

from optical import native

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "sanitized" / native.LIBRARY_NAME
FLAGS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=undefined",
    "-g",
    "-O1",
)


def build() -> None:
    compiler = native.find_compiler()
    if compiler is None:
        sys.exit("no C++ compiler was found")
    native.FLAGS = tuple(x for x in native.FLAGS if x != "-O3") + FLAGS
    # One instruction set: the one that is used here.
    installed = native.load()
    isa = "baseline" if installed is None else installed.optical_cpu_isa().decode()
    flags = dict(native._variants())[isa]
    native._variants = lambda: [("baseline", flags)]
    native.build(ROOT / "csrc", LIBRARY, compiler)


def restart() -> None:
    compiler = native.find_compiler() or ["c++"]
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        ask = [compiler[0], f"-print-file-name={name}"]
        found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        libraries.append(found)
    # Python and PyTorch keep what they allocate until they end.
    os.environ.update(
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> int:
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        build()
        restart()
    library = ctypes.CDLL(str(LIBRARY))
    native._declare(library)
    state = native._State(library, None)
    native._state = lambda: state
    return fuzz.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
