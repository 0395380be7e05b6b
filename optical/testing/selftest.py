"""What works on this machine: versions, devices, backends with reasons, and a test of each backend.

The test runs named problems of ``optical.testing.tolerance`` forward and backward on every backend that is
available, and compares them with the float64 reference by the tolerance rule of the test suite. It
is bounded in time, so that it can be run wherever something looks wrong.
"""

from __future__ import annotations

import platform
import time
import warnings
from typing import Any

import torch

from optical.backends import registry
from optical.backends.problem import example
from optical.io.environment import environment, version
from optical.testing.cases import Case, problems
from optical.testing.tolerance import assert_backend_correct

# Ordinary ones first: padding, options and token vectors, then what rounding spoils.
PROBLEMS = (
    *("32x32", "nan_padding", "cosine_ragged", "sqeuclidean_ragged_packed", "everything"),
    *("epsilon_0.01", "forbidden_lines", "mass_1e-30", "rho", "dot_33x31", "63x64"),
)
GRADIENTS = ("envelope", "implicit")
EXTRAS = (
    *("sentence-transformers", "transformers", "datasets", "ir-measures", "ir-datasets", "bm25s"),
    *("scipy", "matplotlib", "pyyaml", "triton"),
)


def inspect(seconds: float = 10.0) -> dict[str, Any]:
    """Describe this installation and test every backend that is available, as plain data.

    Args:
        seconds: about how long the tests may take together; 0 leaves them out. Each backend runs
            one problem at least; loading PyTorch's own modules beforehand does not count.

    Returns:
        ``passed`` (None where nothing was tested), ``versions``, ``devices``, ``threads`` and
        ``backends``: one entry for each backend and device, with ``reason`` why it is not
        available (None where it is), the names of the ``tested`` problems, and ``failures``.
    """
    entries = [_entry(name, device) for device in _devices() for name in registry.BACKENDS]
    available = [entry for entry in entries if entry["reason"] is None]
    chosen = {problem.name: problem for problem in problems() if problem.name in PROBLEMS}
    if seconds > 0:
        # The first call of all loads what PyTorch loads once, which is nobody's time.
        _failure("reference", chosen["32x32"], "cpu")
    begun = time.monotonic()
    for place, entry in enumerate(available):
        if seconds > 0:
            # What one backend leaves of its time, the next ones share.
            left = seconds - (time.monotonic() - begun)
            _test(entry, chosen, left / (len(available) - place))
    found = environment()
    versions = found["versions"] | {name: version(name) for name in EXTRAS}
    return {
        "passed": not any(entry["failures"] for entry in entries) if seconds > 0 else None,
        "seconds": round(time.monotonic() - begun, 2),
        "versions": {"python": found["python"], **versions},
        "commit": found["commit"],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": [_described(device) for device in _devices()],
        "backends": entries,
    }


def to_text(found: dict[str, Any]) -> str:
    """The same for a person, one line for each fact."""
    versions = {name: v for name, v in found["versions"].items() if v != "not installed"}
    missing = [name for name in found["versions"] if name not in versions]
    lines = [
        f"optical {versions.pop('optical', '(a checkout)')}, commit {found['commit']}",
        f"Python {versions.pop('python')} on {found['platform']}, {found['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if missing:
        lines.append("not installed: " + ", ".join(missing))
    lines += [f"device {device}" for device in found["devices"]]
    if not torch.cuda.is_available():
        lines.append("device cuda: none found")
    lines.append("")
    for entry in found["backends"]:
        state = entry["reason"] or "supported" + (f" ({entry['about']})" if entry["about"] else "")
        lines.append(f"{entry['name']:<10} {entry['device']:<5} {state}")
        if entry["tested"] and not entry["failures"]:
            many = len(entry["tested"])
            lines.append(f"{'':16} {many} problems agree with float64 ({entry['seconds']:.1f} s)")
        lines += [f"{'':16} FAILED {failure}" for failure in entry["failures"]]
    if found["passed"] is not None:
        verdict = "passed" if found["passed"] else "FAILED; please report all of the above"
        lines += ["", f"self-test {verdict}"]
    return "\n".join(lines)


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _described(device: str) -> str:
    if device == "cpu":
        return f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    return f"cuda: {count} x {', '.join(names)}"


def _entry(name: str, device: str) -> dict[str, Any]:
    cost = torch.zeros(1, 1, 1, device=device)
    reason = registry.BACKENDS[name].supports(example(cost))
    about = ""
    if name == "cpu" and reason is None:
        from optical.backends import library as native

        library = native.load()
        assert library is not None
        about = f"{library.optical_cpu_isa().decode()}, {library._name}"
    return {
        "name": name,
        "device": device,
        "reason": reason,
        "about": about,
        "tested": [],
        "failures": [],
        "seconds": 0.0,
    }


def _test(entry: dict[str, Any], chosen: dict[str, Case], seconds: float) -> None:
    """Run problems in turn while time remains, and note what they do in the entry."""
    begun = time.monotonic()
    for name in PROBLEMS:
        if entry["tested"] and time.monotonic() - begun > seconds:
            break
        failure = _failure(entry["name"], chosen[name], entry["device"])
        if failure is None:
            continue
        entry["tested"].append(name)
        if failure:
            entry["failures"].append(failure)
    entry["seconds"] = round(time.monotonic() - begun, 2)


def _failure(backend: str, problem: Case, device: str) -> str | None:
    """What is wrong with a backend on a problem: "" for nothing, None where it does not serve it.

    Whatever a broken installation raises is an answer here, and the other backends are to be asked
    all the same.
    """
    try:
        given = problem.to(torch.float32, device)
        gradients = [
            gradient
            for gradient in GRADIENTS
            if registry.BACKENDS[backend].supports(given.arguments(gradient)) is None
        ]
        if not gradients:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_backend_correct(backend, problem, torch.float32, device, gradients)
    except Exception as error:
        text = f"{problem.name}: {type(error).__name__}: {error}"
        return text.splitlines()[0][:300]
    return ""
