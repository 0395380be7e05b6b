"""Random calls against a library built with sanitizers.

    python tests/sanitize.py --calls 1000            # addresses and undefined behaviour
    python tests/sanitize.py --threads --calls 100   # data races

The first checks the calls of fuzz.py as fuzz.py does. The second solves problems large enough to be
shared out among threads, and not one bit may depend on their number.

The library is built into build/sanitized from the sources at hand, for the instruction set that is
used here. The sanitizers must be loaded before everything else, so the program starts itself again
with them.
"""

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fuzz
import torch

from optical.backends import library as native

ROOT = Path(__file__).resolve().parent.parent
THREADS = "--threads" in sys.argv
LIBRARY = ROOT / "build" / "sanitized" / ("threads" if THREADS else "memory") / native.CPU_LIBRARY
FLAGS = ("-g1", "-O1")
if THREADS:
    FLAGS += ("-fsanitize=thread",)
else:
    FLAGS += (
        "-fsanitize=address,undefined",
        "-fno-sanitize=vptr",
        "-fno-sanitize-recover=undefined",
    )
RUNTIMES = ("libtsan.so",) if THREADS else ("libasan.so", "libubsan.so")
# Python and PyTorch keep what they allocate until they end, and synchronise in ways that the
# sanitizer, which sees only the library's accesses, does not know.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
}
NO_RANDOM_ADDRESSES = 0x0040000  # ADDR_NO_RANDOMIZE of personality(2)


def build() -> None:
    compiler = native.find_compiler()
    if compiler is None:
        sys.exit("no C++ compiler was found")
    # With the flags still those of the installed library.
    installed = native.load_cpu().library
    isa = "baseline" if installed is None else native.instruction_set(installed)
    flags = dict(native.cpu_variants())[isa]
    native.CPU_FLAGS = tuple(x for x in native.CPU_FLAGS if x != "-O3") + FLAGS
    native.cpu_variants = lambda: [("baseline", flags)]
    if not THREADS:
        native.build_cpu(ROOT / "csrc", LIBRARY, compiler)
        return
    # The barriers of OpenMP are not known to the sanitizer; those of the library's own threads are.
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    native.compile_cpu(ROOT / "csrc", LIBRARY, compiler, ["-pthread"])


def restart() -> None:
    compiler = native.find_compiler() or ["c++"]
    libraries = []
    for name in RUNTIMES:
        ask = [compiler[0], f"-print-file-name={name}"]
        found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        libraries.append(found)
    os.environ.update(OPTIONS, LD_PRELOAD=" ".join(libraries))
    if THREADS and sys.platform == "linux":
        # The sanitizer of threads wants memory where it expects it.
        ctypes.CDLL(None).personality(NO_RANDOM_ADDRESSES)
    os.execv(sys.executable, [sys.executable, *sys.argv])


class Large(fuzz.Dice):
    """Problems of which one alone is shared out, where there are fewer of them than threads."""

    def size(self) -> int:
        return self.between(257, 400)


def draw_large(seed: int) -> fuzz.Call:
    call = fuzz.draw_valid(Large(seed))
    if call.option("gradient") == "unroll" and call.option("anneal") is not None:
        call = call.but(anneal=None)  # which the reference would serve
    return replace(call, threads=3)


def check_threads(call: fuzz.Call) -> None:
    torch.set_num_threads(call.threads)
    fuzz._check_threads(call, fuzz.outputs(call))


def main() -> int:
    if RUNTIMES[0] not in os.environ.get("LD_PRELOAD", ""):
        build()
        restart()
    library = ctypes.CDLL(str(LIBRARY))
    state = native.Loaded(library, None)
    native.load_cpu = lambda: state
    arguments = [x for x in sys.argv[1:] if x != "--threads"]
    return fuzz.main(arguments, *((draw_large, check_threads) if THREADS else ()))


if __name__ == "__main__":
    sys.exit(main())
