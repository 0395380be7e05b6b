"""Builds for the window, kept in a folder: the CUDA library, the probe, and its expected outputs.

    python -m benchmarks.gpu.builds --work build/gpu

Files carry a hash of their sources in their names and are built only if missing, so the folder can
be made on another machine and carried along. The CUDA library is ``optical/_cuda.so``. With
``--triton``, the folder receives the Triton kernels of the timings as well, compiled for an H200
over a driver that does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.runner import ROOT

PROBE = ROOT / "benchmarks" / "gpu" / "probe"
# Where no device is found, the library is built for this one.
DEFAULT_ARCHITECTURES = ("90a",)
# The shapes of the window, most valuable first; ``benchmarks.gpu.measure.shapes`` has their sizes.
SHAPES = ("T3", "L2", "T1", "T2", "T4", "T5", "T6", "T7", "T8", "T9")
PACKAGES = ("torch", "triton", "jax", "ott-jax", "numpy", "pytest", "pytest-xdist", "POT")
# A tool's stand-in drops the options of the tool and runs the command after them.
TOOL = """\
#!/bin/sh
name=$(basename "$0")
while [ "$#" -gt 0 ]; do
    case "$1" in *python*|*/probe-*) break ;; esac
    shift
done
echo "== $name is a stand-in (rehearsal, no measurement)"
exec "$@"
"""
TOOLS = ("ncu", "compute-sanitizer")


def sources_hash() -> str:
    """Hash the kernels, their emulator and the probe."""
    digest = hashlib.sha256()
    folders = (ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_emulator", PROBE)
    files = [ROOT / "csrc" / "sinkhorn.h"]
    files += [path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def emulated_library(work: Path) -> Path:
    return work / f"emulated-{sources_hash()}.so"


def probe_binary(work: Path) -> Path:
    return work / f"probe-{sources_hash()}"


def expected_outputs(work: Path, only: str = "") -> Path:
    chosen = f"-{only.replace(' ', '_')}" if only else ""
    return work / f"expected-{sources_hash()}{chosen}.bin"


def _compile(command: list[str], target: Path) -> None:
    """Run a compiler whose output replaces ``target`` only if it succeeds."""
    partial = target.with_name(f".{os.getpid()}-{target.name}")
    subprocess.run([*command, "-o", str(partial)], check=True)
    os.replace(partial, target)


def build_probe(work: Path) -> None:
    from optical.backends import library

    target = probe_binary(work)
    if target.exists():
        return
    compiler = library.find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found")
    flags = ["-O1", "-std=c++17", f"-I{ROOT / 'csrc'}", str(PROBE / "probe.cpp"), "-ldl"]
    _compile([*compiler, *flags], target)


def build_emulated(work: Path) -> None:
    from tests.cuda_emulator.build import build

    target = emulated_library(work)
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=work) as folder:
            os.replace(build(Path(folder), "-O1"), target)


def build_expected(work: Path, only: str = "") -> None:
    """Run the probe's cases on the emulated kernels, on all cores."""
    target = expected_outputs(work, only)
    if target.exists():
        return
    shards = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=work) as folder:
        parts = [Path(folder) / str(shard) for shard in range(shards)]
        processes = [
            subprocess.Popen(
                [
                    *(str(probe_binary(work)), str(emulated_library(work)), "cpu", "write"),
                    *(str(part), "--shard", f"{shard}/{shards}", "--only", only),
                ],
                stdout=subprocess.DEVNULL,
            )
            for shard, part in enumerate(parts)
        ]
        for process in processes:
            process.wait()
        whole = Path(folder) / "whole"
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        os.replace(whole, target)


def build_library(work: Path) -> None:
    """Build ``optical/_cuda.so``, unless it is there and of the present sources."""
    from optical.backends import library

    folder = library.source_folder()
    assert folder is not None
    print(f"the sources are {library.cuda_source_hash(folder)}", flush=True)
    try:
        library.open_installed(library.CUDA_LIBRARY, library.cuda_source_hash(folder), "missing")
        return
    except library.BuildError as error:
        print(f"optical/{library.CUDA_LIBRARY}: {error}", flush=True)
    nvcc = library.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found")
    found = library.driver_architectures() or DEFAULT_ARCHITECTURES
    architectures = [_specific(name, library.CUDA_ARCHITECTURES) for name in found]
    library.build_cuda(folder, ROOT / "optical" / library.CUDA_LIBRARY, nvcc, architectures)


def _specific(architecture: str, known: Iterable[str]) -> str:
    """The name with its suffix, such as "90a" for "90", if the library is built for that."""
    return next((name for name in known if name.rstrip("af") == architecture), architecture)


def stand_ins(work: Path) -> Path:
    """The folder of the tools and the driver."""
    return work / "stand-ins"


def build_stand_ins(work: Path) -> None:
    """Write the tools and compile the driver."""
    from optical.backends import library

    folder = stand_ins(work)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOOLS:
        path = folder / name
        path.write_text(TOOL)
        path.chmod(0o755)
    compiler = library.find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found")
    source, target = PROBE / "stand_in_driver.cpp", folder / "libcuda.so.1"
    if not target.exists():
        _compile([*compiler, "-O1", "-shared", "-fPIC", str(source)], target)


def build_all(work: Path, rehearse: bool, only: str) -> int:
    """Build everything, the CUDA library beside the rest; the number of failures."""
    work.mkdir(parents=True, exist_ok=True)
    failures = 0

    def probe_and_outputs() -> None:
        build_probe(work)
        build_emulated(work)
        build_expected(work, only)

    tasks = {"probe": probe_and_outputs, "library": lambda: build_library(work)}
    if rehearse:
        tasks["library"] = lambda: build_stand_ins(work)
    with ThreadPoolExecutor() as pool:
        start = time.monotonic()
        futures = {name: pool.submit(task) for name, task in tasks.items()}
        for name, future in futures.items():
            error = future.exception()
            failures += error is not None
            outcome = (
                f"failed: {error}" if error else f"ready after {time.monotonic() - start:.0f} s"
            )
            print(f"{name}: {outcome}", flush=True)
    return failures


def fill_tritons_cache(work: Path) -> int:
    """Compile the Triton kernels of the timings, one shape after the other; failed shapes."""
    work.mkdir(parents=True, exist_ok=True)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(work / "triton")}
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--idle-driver"]
    command += ["--rows", str(work / "none.csv"), "--work", str(work), "--once"]
    requests = [json.dumps({"step": "warm", "shape": name, "seconds": 3600}) for name in SHAPES]
    return sum(
        subprocess.run([*command, request], cwd=ROOT, env=variables).returncode != 0
        for request in requests
    )


def describe() -> None:
    """Print the versions and the device."""
    print(platform.platform(), "Python", platform.python_version(), os.cpu_count(), "cores")
    for package in PACKAGES:
        try:
            print(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            print(package, "is not installed")
    commands = (["nvidia-smi"], ["nvcc", "--version"], ["ncu", "--version"])
    for command in commands:
        if shutil.which(command[0]) is None:
            print(command[0], "is not on the path")
            continue
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        print(done.stdout.strip() or done.stderr.strip(), flush=True)
    git = shutil.which("git")
    done = subprocess.run([git or "false", "log", "-1"], capture_output=True, text=True, cwd=ROOT)
    print(done.stdout.strip() or "the commit is unknown: this is no clone", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.builds", description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--only", default="", help="expected outputs of the cases with this text")
    parser.add_argument("--rehearse", action="store_true", help="build stand-ins, no CUDA library")
    parser.add_argument("--triton", action="store_true", help="compile Triton's kernels too")
    parser.add_argument("--describe", action="store_true", help="print versions and the device")
    args = parser.parse_args()
    if args.describe:
        describe()
        return 0
    work = args.work.resolve()
    failures = build_all(work, args.rehearse, args.only)
    if args.triton:
        failures += fill_tritons_cache(work)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
