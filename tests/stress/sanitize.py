"""Random calls on a library built with sanitizers.

    python -m tests.stress.sanitize --calls 1000            # addresses and undefined behaviour
    python -m tests.stress.sanitize --threads --calls 100   # data races

The first command checks ordinary random calls. The second solves problems large enough to be split
among threads, and requires the same bits for any number of threads.

The library is built into ``build/sanitized`` from ``csrc`` for the instruction set of this machine.
Sanitizers must be loaded before everything else, so the program restarts itself with them.
"""

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from optical.backends import library
from tests.stress.calls import Call, outputs
from tests.stress.check import check_threads
from tests.stress.draw import Dice, draw_valid
from tests.stress.run import main

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "python -m tests.stress.sanitize"
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")
THREADS = ("-fsanitize=thread",)
# Python and PyTorch release their memory only at exit. The thread sanitizer sees the accesses of
# the library alone, not the synchronisation of PyTorch.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
}
NO_RANDOM_ADDRESSES = 0x0040000  # ADDR_NO_RANDOMIZE of personality(2)


def library_path(threads: bool) -> Path:
    return ROOT / "build" / "sanitized" / ("threads" if threads else "memory") / library.CPU_LIBRARY


def build(threads: bool) -> None:
    """Compile the sources with the sanitizers of addresses or of threads."""
    compiler = library.find_compiler()
    if compiler is None:
        sys.exit("no C++ compiler was found")
    # Ask for the instruction set before the flags change.
    installed = library.load_cpu().library
    isa = "baseline" if installed is None else library.instruction_set(installed)
    flags = dict(library.cpu_variants())[isa]
    sanitizers = THREADS if threads else MEMORY
    library.CPU_FLAGS = (*(x for x in library.CPU_FLAGS if x != "-O3"), "-g1", "-O1", *sanitizers)
    library.cpu_variants = lambda: [("baseline", flags)]
    path = library_path(threads)
    if not threads:
        library.build_cpu(ROOT / "csrc", path, compiler)
        return
    # The sanitizer knows the threads of the library but not the barriers of OpenMP.
    path.parent.mkdir(parents=True, exist_ok=True)
    library.compile_cpu(ROOT / "csrc", path, compiler, ["-pthread"])


def runtimes(threads: bool) -> tuple[str, ...]:
    return ("libtsan.so",) if threads else ("libasan.so", "libubsan.so")


def restart(threads: bool) -> None:
    """Run this program again with the sanitizers preloaded."""
    compiler = library.find_compiler() or ["c++"]
    libraries = []
    for name in runtimes(threads):
        command = [compiler[0], f"-print-file-name={name}"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        libraries.append(output.strip())
    os.environ.update(OPTIONS, LD_PRELOAD=" ".join(libraries))
    if threads and sys.platform == "linux":
        # The thread sanitizer needs its shadow memory at fixed addresses.
        ctypes.CDLL(None).personality(NO_RANDOM_ADDRESSES)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class LargeDice(Dice):
    """Dice for problems that are split among threads when there are fewer of them than threads."""

    def size(self) -> int:
        return self.between(257, 400)


def draw_large(seed: int) -> Call:
    call = draw_valid(LargeDice(seed))
    if call.option("gradient") == "unroll" and call.option("anneal") is not None:
        call = call.but(anneal=None)  # the reference would serve it instead of the library
    return replace(call, threads=3)


def check_large(call: Call) -> None:
    torch.set_num_threads(call.threads)
    check_threads(call, outputs(call))


def run(arguments: list[str]) -> int:
    """Build the library and check random calls on it; returns the exit status."""
    threads = "--threads" in arguments
    if runtimes(threads)[0] not in os.environ.get("LD_PRELOAD", ""):
        build(threads)
        restart(threads)
    loaded = library.Loaded(ctypes.CDLL(str(library_path(threads))), None)
    library.load_cpu = lambda: loaded
    options = [x for x in arguments if x != "--threads"]
    if not threads:
        return main(options, program=PROGRAM)
    return main(options, draw_large, check_large, f"{PROGRAM} --threads")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
