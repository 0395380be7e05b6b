"""Self-test of an installation: versions, devices, and each backend against the float64 reference.

Runs cases of ``optical.testing.cases`` forward and backward on every available backend and applies
the tolerance rule of ``optical.testing.tolerance``, within a time limit.
"""

from __future__ import annotations

import platform
import time
import warnings
from typing import Any

import torch

from optical.backends import library, registry
from optical.backends.problem import example_problem
from optical.io import nvidia
from optical.io.environment import environment, version
from optical.testing.cases import Case, all_cases
from optical.testing.tolerance import assert_backend_correct

# Ordinary cases come first (padding, options, token vectors), then those prone to rounding errors.
CASES = (
    *("32x32", "nan_padding", "cosine_ragged", "sqeuclidean_ragged_packed", "everything"),
    *("epsilon_0.01", "no_allowed_pair", "mass_1e-30", "rho", "dot_33x31", "63x64"),
)
GRADIENTS = ("envelope", "implicit")
EXTRAS = (
    *("sentence-transformers", "transformers", "datasets", "ir-measures", "ir-datasets", "bm25s"),
    *("scipy", "matplotlib", "pyyaml", "triton"),
)


def inspect(seconds: float = 10.0) -> dict[str, Any]:
    """Describe this installation and test every available backend.

    Args:
        seconds: approximate time limit of the tests; 0 skips them. Each backend runs at least one
            case. The warm-up of PyTorch does not count.

    Returns:
        A dictionary that JSON can represent. ``passed`` is None if nothing was tested. ``seconds``,
        ``versions``, ``commit``, ``platform``, ``threads`` and ``devices`` describe the
        installation. ``backends`` has one entry for each backend and device, with the ``reason`` it
        is not available (None if it is), the names of the ``tested`` cases, and ``failures``.
    """
    entries = [_entry(name, device) for device in _devices() for name in registry.BACKENDS]
    available = [entry for entry in entries if entry["reason"] is None]
    cases = {case.name: case for case in all_cases() if case.name in CASES}
    if seconds > 0:
        # Warm up: PyTorch's one-time lazy loading must not count against a backend.
        _failure("reference", cases["32x32"], "cpu")
    start = time.monotonic()
    for index, entry in enumerate(available):
        if seconds > 0:
            # Time that a backend leaves unused is shared by those that follow.
            remaining = seconds - (time.monotonic() - start)
            _test(entry, cases, remaining / (len(available) - index))
    installation = environment()
    versions = installation["versions"] | {name: version(name) for name in EXTRAS}
    return {
        "passed": not any(entry["failures"] for entry in entries) if seconds > 0 else None,
        "seconds": round(time.monotonic() - start, 2),
        "versions": {"python": installation["python"], **versions},
        "commit": installation["commit"],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": [_describe(device) for device in _devices()],
        "backends": entries,
    }


def to_text(report: dict[str, Any]) -> str:
    """Format the result of ``inspect`` as text, one fact per line."""
    versions = {name: v for name, v in report["versions"].items() if v != "not installed"}
    missing = [name for name in report["versions"] if name not in versions]
    lines = [
        f"optical {versions.pop('optical', '(a checkout)')}, commit {report['commit']}",
        f"Python {versions.pop('python')} on {report['platform']}, {report['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if missing:
        lines.append("not installed: " + ", ".join(missing))
    lines += [f"device {device}" for device in report["devices"]]
    if not torch.cuda.is_available():
        lines.append(f"device cuda: none, since {nvidia.missing_device()}")
    lines.append("")
    for entry in report["backends"]:
        state = entry["reason"] or "supported" + (f" ({entry['about']})" if entry["about"] else "")
        lines.append(f"{entry['name']:<10} {entry['device']:<5} {state}")
        if entry["tested"] and not entry["failures"]:
            count = len(entry["tested"])
            lines.append(f"{'':16} {count} problems agree with float64 ({entry['seconds']:.1f} s)")
        lines += [f"{'':16} FAILED {failure}" for failure in entry["failures"]]
    if report["passed"] is not None:
        verdict = "passed" if report["passed"] else "FAILED; please report all of the above"
        lines += ["", f"self-test {verdict}"]
    return "\n".join(lines)


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _describe(device: str) -> str:
    if device == "cpu":
        return f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    return f"cuda: {count} x {', '.join(names)}"


def _entry(name: str, device: str) -> dict[str, Any]:
    """Describe a backend on a device, not tested yet."""
    cost = torch.zeros(1, 1, 1, device=device)
    reason = registry.BACKENDS[name].supports(example_problem(cost))
    about = ""
    if name == "cpu" and reason is None:
        native = library.load_cpu().require()
        about = f"{library.instruction_set(native)}, {native._name}"
    return {
        "name": name,
        "device": device,
        "reason": reason,
        "about": about,
        "tested": [],
        "failures": [],
        "seconds": 0.0,
    }


def _test(entry: dict[str, Any], cases: dict[str, Case], seconds: float) -> None:
    """Run cases in turn until the time is over, and add their names and failures to the entry."""
    start = time.monotonic()
    for name in CASES:
        if entry["tested"] and time.monotonic() - start > seconds:
            break
        failure = _failure(entry["name"], cases[name], entry["device"])
        if failure is None:
            continue
        entry["tested"].append(name)
        if failure:
            entry["failures"].append(failure)
    entry["seconds"] = round(time.monotonic() - start, 2)


def _failure(backend: str, case: Case, device: str) -> str | None:
    """Return why a backend fails a case: "" if it passes, None if it does not support the case.

    Exceptions of a broken installation are failures too, so that the other backends are tested.
    """
    try:
        run = case.to(torch.float32, device)
        gradients = [
            gradient
            for gradient in GRADIENTS
            if registry.BACKENDS[backend].supports(run.problem(gradient)) is None
        ]
        if not gradients:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_backend_correct(backend, case, torch.float32, device, gradients)
    except Exception as error:
        text = f"{case.name}: {type(error).__name__}: {error}"
        return text.splitlines()[0][:300]
    return ""
