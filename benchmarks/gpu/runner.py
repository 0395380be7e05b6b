"""Runs steps within a deadline: processes with time limits, and the measuring process.

A step that fails, hangs or is killed costs only itself. Standard library only, so that the first
line of the log is written at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
# Time between the polite signal to a process beyond its limit and the final one.
GRACE = 5.0
# Kept of the output of a step in the background, whose tools may print without end.
KEPT_BYTES = 2_000_000
TIMED_OUT, MISSING, SKIPPED = 124, 127, -1
# The step has run, and some of its rows have failed.
WRONG_ROWS = 3


@dataclass(frozen=True)
class Step:
    """One step: a command, or a request to the measuring process.

    Attributes:
        seconds: its time limit.
        command: a process of its own.
        request: a request of ``benchmarks.gpu.measure``, without its seconds.
        output: file in the output folder that receives what a command prints.
        environment: variables in addition to those of the window.
        background: the step runs beside the next ones, up to the first that is ``alone``.
        alone: no step in the background may run beside it, since it measures times.
        least: the step is skipped if fewer seconds are left.
    """

    name: str
    seconds: float
    command: tuple[str, ...] = ()
    request: Mapping[str, Any] | None = None
    output: str = "log.txt"
    environment: Mapping[str, str] = field(default_factory=dict)
    background: bool = False
    alone: bool = False
    least: float = 8.0


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[str]
    start: float
    end: float
    file: IO[str]


class Window:
    """The time in which all steps run, with their log.

    Args:
        output: folder of the results.
        work: folder of everything that need not be kept.
        seconds: time until everything has ended.
        measure: command that starts the measuring process.
        environment: variables of all processes.
        prefix: of the names of all files in ``output``.
    """

    def __init__(
        self,
        output: Path,
        work: Path,
        seconds: float,
        measure: Sequence[str],
        environment: Mapping[str, str],
        prefix: str = "",
    ) -> None:
        self.output, self.work, self.measure = output, work, tuple(measure)
        self.environment, self.prefix = dict(os.environ) | dict(environment), prefix
        self.begin = time.monotonic()
        self.end = self.begin + seconds
        self.results: dict[str, int] = {}
        self.background: list[_Running] = []
        self.worker: subprocess.Popen[str] | None = None
        self.log = self._path("log.txt").open("a", encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.output / f"{self.prefix}{name}"

    def say(self, text: str) -> None:
        """Write a line to the log and to standard output."""
        line = f"[{time.monotonic() - self.begin:6.1f}] {text}"
        for file in (self.log, sys.stdout):
            print(line, file=file, flush=True)

    def run(self, steps: Sequence[Step]) -> dict[str, int]:
        """Run the steps in order; by name their exit codes, or a constant of this module."""
        try:
            for step in steps:
                self._run_step(step)
            self._wait_for_background()
        finally:
            self._stop_everything()
            self.log.close()
        return self.results

    def _run_step(self, step: Step) -> None:
        if step.alone:
            self._wait_for_background()
        left = self.end - time.monotonic() - GRACE
        if left < min(step.least, step.seconds):
            self.results[step.name] = SKIPPED
            self.say(f"{step.name}: skipped, {max(left, 0):.0f} s are left")
            return
        limit = min(step.seconds, left)
        start = time.monotonic()
        if step.request is not None:
            self._record(step, self._ask(step, limit), start)
            return
        try:
            running = self._start(step, limit)
        except OSError as error:
            self.say(f"{step.name}: {error}")
            self.results[step.name] = MISSING
            return
        if not step.background:
            code = self._finish(running)
            self.background.remove(running)
            self._record(step, code, start)

    def _record(self, step: Step, code: int, start: float) -> None:
        self.results[step.name] = code
        known = {0: "done", TIMED_OUT: "stopped at its limit", WRONG_ROWS: "done, with failed rows"}
        outcome = known.get(code, f"failed with {code}")
        seconds = time.monotonic() - start
        last = "" if step.request is not None else self._last_line(step)
        self.say(f"{step.name}: {outcome} after {seconds:.1f} s{last}")

    def _last_line(self, step: Step) -> str:
        path = self._path(step.output)
        if step.output == "log.txt" or not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            lines = file.read().decode(errors="replace").strip().splitlines()
        return f" | {lines[-1][:160]}" if lines else ""

    # ------------------------------------------------------------------------------ processes

    def _start(self, step: Step, limit: float) -> _Running:
        """Start the process of a step; foreground steps write to their file directly."""
        path = self._path(step.output)
        if step.background:
            path = self.work / f"{step.name}.log"
            path.unlink(missing_ok=True)
        environment = self.environment | dict(step.environment)
        program = shutil.which(step.command[0], path=environment.get("PATH"))
        if program is None:
            raise FileNotFoundError(f"{step.command[0]} was not found")
        file = path.open("a", encoding="utf-8")
        print(f"\n== {step.name}: {' '.join(step.command)[:2000]}", file=file, flush=True)
        process = subprocess.Popen(
            (program, *step.command[1:]),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        now = time.monotonic()
        running = _Running(step, process, now, now + limit, file)
        self.background.append(running)
        return running

    def _finish(self, running: _Running) -> int:
        """Wait for a process until its limit, with an eye on the background; its exit code."""
        while running.process.poll() is None:
            if time.monotonic() > running.end:
                _stop(running.process)
                running.file.close()
                return TIMED_OUT
            self._collect_background(except_for=running)
            time.sleep(0.05)
        running.file.close()
        _kill_group(running.process)
        code = running.process.returncode
        # Pytest exits with 5 if it selects no test.
        return 0 if code == 5 and "pytest" in running.step.command else code

    def _collect_background(self, except_for: _Running | None = None) -> None:
        for running in list(self.background):
            late = time.monotonic() > running.end
            if running is except_for or (running.process.poll() is None and not late):
                continue
            code = self._finish(running)
            self.background.remove(running)
            log = self.work / f"{running.step.name}.log"
            text = log.read_bytes()[-KEPT_BYTES:].decode(errors="replace")
            with self._path(running.step.output).open("a", encoding="utf-8") as file:
                file.write(text)
            self._record(running.step, code, running.start)

    def _wait_for_background(self) -> None:
        while self.background:
            self._collect_background()
            time.sleep(0.05)

    # ------------------------------------------------------------------- the measuring process

    def _ask(self, step: Step, limit: float) -> int:
        """Send a request to the measuring process, started if there is none; its answer."""
        end = time.monotonic() + limit
        self.log.write(f"\n== {step.name}: {json.dumps(step.request)}\n")
        self.log.flush()
        if self.worker is None:
            self.worker = subprocess.Popen(
                self.measure,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                bufsize=1,
                start_new_session=True,
            )
        worker = self.worker
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps({**(step.request or {}), "seconds": limit}) + "\n")
            worker.stdin.flush()
        except OSError:
            self._stop_worker()
            return 1
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            while not selector.select(timeout=0.2):
                self._collect_background()
                if time.monotonic() > end:
                    self._stop_worker()
                    return TIMED_OUT
        answer = worker.stdout.readline().strip()
        if answer not in ("0", str(WRONG_ROWS)):
            # A process that crashed, or whose device may be lost; the next request starts another.
            self._stop_worker()
        return int(answer) if answer else 1

    def _stop_worker(self) -> None:
        if self.worker is not None:
            _kill_group(self.worker)
            _reap(self.worker)
            for pipe in (self.worker.stdin, self.worker.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self.worker = None

    def _stop_everything(self) -> None:
        self._stop_worker()
        for running in self.background:
            _kill_group(running.process)
            _reap(running.process)
            running.file.close()
        self.background.clear()


def _stop(process: subprocess.Popen[str]) -> None:
    """Interrupt a process, which lets pytest print its failures, then kill its group."""
    process.send_signal(signal.SIGINT)
    _reap(process)
    _kill_group(process)
    _reap(process)


def _reap(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a process, but not for ever: a driver may hold it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill what a process has left running; it leads a group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
