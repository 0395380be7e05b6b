"""Plant small faults one at a time, and check that the tests or the random calls notice each.

    python -m tests.stress.mutants
    python -m tests.stress.mutants --language cpu
    python -m tests.stress.mutants --only cpu-gradient triton-gradient
    python -m tests.stress.mutants --resume

Every fault of ``tests.stress.faults`` is applied to a copy of the checkout. The test files of its
language run first and stop at the first failure; if they pass, 2,000 random calls follow. ``--by``
runs only the tests or only the calls. A failure counts only if it disappears with the fault. The
table shows the test or the call that noticed each fault. The exit status is 1 if a fault was not
noticed or does not apply. Results are kept in ``build/mutants.jsonl``, so ``--resume`` continues
after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from optical.backends.library import CPU_LIBRARY
from tests.stress.faults import FAULTS, LANGUAGES, Fault

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "mutants.jsonl"
CALLS = 2000
TIMEOUT = 3600  # seconds for one command; a fault that hangs is noticed
TESTS = {
    "python": (
        "backends/test_reference",
        "backends/test_dense",
        "ot/test_operator",
        "ot/test_functional",
        "losses/test_alignment",
    ),
    "cpu": (
        "backends/test_registry",
        "ot/test_functional",
        "ot/test_operator",
        "backends/test_properties",
        "backends/test_cpu",
    ),
    "cuda": ("backends/test_cuda_emulated",),
    "triton": (),
}
# The library for one instruction set, which takes a third of the time; accepted as the whole one.
BUILD = """
import sys
from pathlib import Path
from optical.backends import library

csrc, target, isa = Path("csrc"), Path(sys.argv[1]), sys.argv[2]
digest, flags = library.cpu_source_hash(csrc), dict(library.cpu_variants())[isa]
library.cpu_source_hash = lambda folder: digest
library.cpu_variants = lambda: [("baseline", flags)]
library.build_cpu(csrc, target, library.find_compiler())
"""
ISA = (
    "from optical.backends import library;"
    "print(library.instruction_set(library.load_cpu().library))"
)


@dataclasses.dataclass(frozen=True)
class Sighting:
    """A failure in the presence of a fault.

    Attributes:
        source: test id, or the seed of a random call.
        again: arguments of Python that repeat the failure.
    """

    source: str
    again: tuple[str, ...]


class Checkout:
    """A copy of the checkout in which faults are planted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            source, target = ROOT / name, root / name
            if source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)

    def python(self, *arguments: str, language: str = "") -> subprocess.CompletedProcess[str]:
        """Run Python in the copy."""
        # An interpreted kernel is chosen when it is imported, so the variable is set at the start.
        interpreted = {"TRITON_INTERPRET": "1"} if language == "triton" else {}
        environment = os.environ | interpreted
        environment |= {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, *arguments]
        options = {"capture_output": True, "text": True, "timeout": TIMEOUT}
        return subprocess.run(command, cwd=self.root, env=environment, **options)

    def build(self, language: str) -> None:
        """Put the CPU library of the present sources into the copy, for faults in C++."""
        if language != "cpu":
            return
        digest = hashlib.sha256()
        for path in sorted((self.root / "csrc").rglob("*.*")):
            digest.update(path.read_bytes())
        stored = self.root / "build" / digest.hexdigest() / "library"
        if not stored.is_file():
            self._compile(stored)
        shutil.copy2(stored, self.root / "optical" / CPU_LIBRARY)

    def _compile(self, target: Path) -> None:
        isa = subprocess.run(
            [sys.executable, "-c", ISA], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        built = self.python("-c", BUILD, str(target), isa)
        if built.returncode:
            raise ValueError(f"the fault does not compile: {built.stderr[-300:]}")


@dataclasses.dataclass(frozen=True)
class Effort:
    """Which commands run for each fault.

    Attributes:
        by: "tests", "calls", or empty for both.
        calls, seconds: number of random calls and their time limit.
    """

    by: str = ""
    calls: int = CALLS
    seconds: float = 600.0


def steps(fault: Fault, effort: Effort) -> Iterator[tuple[str, ...]]:
    """The commands that may notice a fault, as arguments of Python."""
    if effort.by != "calls":
        yield from _tests(fault)
    if effort.by != "tests":
        kernels = {"cuda": ("cuda",), "triton": (fault.kernels,)}.get(fault.language)
        program = ("tests.stress.kernels", *kernels) if kernels else ("tests.stress",)
        options = ("--calls", str(effort.calls), "--seconds", str(effort.seconds))
        yield ("-m", *program, *options, "--failures", "1")


def _tests(fault: Fault) -> Iterator[tuple[str, ...]]:
    """Commands of the test files, the likeliest ones first."""
    pytest = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
    if fault.language == "triton":
        yield (*pytest, "tests/kernels/interpreter")
    likely = fault.tests
    if likely:
        yield (*pytest, *likely)
    names = (f"tests/{name}.py" for name in TESTS[fault.language])
    others = [name for name in names if name not in likely]
    if others:
        yield (*pytest, *others)


def sighting(arguments: Sequence[str], output: str) -> Sighting:
    """Find the failure in the output of a command that did not succeed."""
    seed = re.search(r"^FAILED: python (.*) (--seed \d+) --calls 1$", output, re.MULTILINE)
    if seed:
        return Sighting(f"call {seed[2]}", (*seed[1].split(), *seed[2].split(), "--calls", "1"))
    test = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", output, re.MULTILINE)
    if not test:
        raise ValueError(f"{' '.join(arguments)} failed without a test: {output[-500:]}")
    options = arguments[: arguments.index("-m", 2) + 2]
    return Sighting(test[1], (*options, test[1]))


def look(checkout: Checkout, fault: Fault, effort: Effort) -> Sighting | None:
    """Run the steps until one of them fails."""
    checkout.build(fault.language)
    for arguments in steps(fault, effort):
        try:
            done = checkout.python(*arguments, language=fault.language)
        except subprocess.TimeoutExpired:
            return Sighting(f"a hang of {' '.join(arguments)}", ())
        if done.returncode:
            return sighting(arguments, done.stdout + done.stderr)
    return None


def try_fault(checkout: Checkout, fault: Fault, effort: Effort) -> str:
    """Plant a fault; returns the test or the call that noticed it, or an empty string.

    Raises:
        ValueError: the fault does not apply or compile, or the failure is not due to it.
    """
    path = checkout.root / fault.path
    original = path.read_bytes()
    try:
        fault.apply(checkout.root)
        seen = look(checkout, fault, effort)
    finally:
        path.write_bytes(original)
    if seen is None:
        return ""
    if seen.again:
        checkout.build(fault.language)
        again = checkout.python(*seen.again, language=fault.language)
        if again.returncode:
            raise ValueError(f"{seen.source} fails without the fault: {again.stdout[-300:]}")
    return seen.source


def digest(fault: Fault) -> str:
    """A hash of the fault and of the file in which it is planted."""
    text = (ROOT / fault.path).read_bytes()
    return hashlib.sha256(repr(fault).encode() + text).hexdigest()[:16]


def noticed_before() -> dict[str, str]:
    """The sightings of earlier runs, by the digest of the fault."""
    if not RESULTS.is_file():
        return {}
    records = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {record["digest"]: record["seen_by"] for record in records if record["seen_by"]}


def remember(fault: Fault, seen_by: str) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    record = {"name": fault.name, "digest": digest(fault), "seen_by": seen_by}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def main(arguments: Sequence[str], faults: Sequence[Fault] = FAULTS) -> int:
    """Try the chosen faults and print the table; returns the exit status."""
    options = _parse(arguments, faults)
    chosen = [
        fault
        for fault in faults
        if (not options.only or fault.name in options.only)
        and (not options.language or fault.language == options.language)
    ]
    effort = Effort(options.by, options.calls, options.seconds)
    before = noticed_before() if options.resume else {}
    failures = 0
    with tempfile.TemporaryDirectory(prefix="optical-mutants-") as folder:
        checkout = Checkout(Path(folder))
        for fault in chosen:
            start, seen_by = time.monotonic(), before.get(digest(fault), "")
            try:
                if not seen_by:
                    seen_by = try_fault(checkout, fault, effort)
                    remember(fault, seen_by)
                verdict = f"seen by {seen_by}" if seen_by else "NOT SEEN"
            except ValueError as error:
                seen_by, verdict = "", f"DOES NOT APPLY: {error}"
            failures += not seen_by
            elapsed = time.monotonic() - start
            print(f"{fault.name:26} {elapsed:5.0f} s  {verdict}", flush=True)
    print(f"{len(chosen)} faults, {failures} not seen")
    return 1 if failures else 0


def _parse(arguments: Sequence[str], faults: Sequence[Fault]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.mutants", description="Check that planted faults are noticed."
    )
    names = [fault.name for fault in faults]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these faults")
    parser.add_argument("--language", choices=LANGUAGES, help="faults of this language")
    parser.add_argument("--by", choices=("tests", "calls"), default="", help="only these")
    parser.add_argument("--calls", type=int, default=CALLS, help="number of random calls")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of random calls")
    parser.add_argument("--resume", action="store_true", help="skip faults noticed before")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
