"""Stand-ins for a device, so that the whole command runs on a CPU.

The CUDA kernels run in their emulator and the Triton kernels in Triton's interpreter, on CPU
tensors. Events, streams and graphs of ``torch.cuda`` are replaced: a captured call is run once, a
replay does nothing, and times are those of the host, so they mean nothing. The probe runs on a
driver of a dozen functions, under scripts that stand in for the profiler and the sanitizers.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import builds

DEVICE_NAME = "emulated on a CPU (rehearsal, no measurement)"
LIBRARY_VARIABLE = "OPTICAL_REHEARSED_LIBRARY"


def environment(work: Path, path: str) -> dict[str, str]:
    """Variables under which processes find the stand-ins of the tools, before those of ``path``."""
    return {
        "PATH": f"{builds.stand_ins(work)}{os.pathsep}{path}",
        "TRITON_INTERPRET": "1",
        LIBRARY_VARIABLE: str(builds.emulated_library(work)),
    }


def install(work: Path) -> None:
    """Replace the device, and the kernels of both backends, in this process."""
    from tests.kernels.interpreted import patch_once

    # Interpreted kernels compute with infinities, of which NumPy warns.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    use_emulated_kernels(builds.emulated_library(work))
    patch_once(setattr)
    replace_device(setattr)


def replace_device(replace_attribute: Callable[[Any, str, Any], None]) -> None:
    """Replace ``torch.cuda`` and the settings of the measurements.

    Args:
        replace_attribute: ``setattr``, or ``monkeypatch.setattr`` of a test.
    """
    import torch

    from benchmarks.gpu.measure.shapes import MACHINE
    from optical.ot import checks, masses

    settings = {"device": "cpu", "name": DEVICE_NAME, "rehearsal": True, "rounds": 2, "calls": 1}
    for name, value in (settings | {"sets": 2, "compiler": "eager"}).items():
        replace_attribute(MACHINE, name, value)
    replaced: dict[str, Any] = {
        "Event": _Event,
        "Stream": _Stream,
        "CUDAGraph": _Graph,
        "graph": _Capture,
        "stream": lambda stream: stream,
        "current_stream": lambda device=None: _Stream(),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
    }
    for name, value in replaced.items():
        replace_attribute(torch.cuda, name, value)
    # Values of a device are not available to the checks of arguments.
    for module in (checks, masses):
        replace_attribute(module, "values_available", lambda tensor: False)


def use_idle_driver(rehearse: bool) -> None:
    """Give Triton a driver that does nothing; for a process that has not imported Triton.

    Triton compiles for an H200, as on the device. With ``rehearse``, tiny shapes.
    """
    from benchmarks.launches import idle_driver

    idle_driver.install()
    replace_device(setattr)

    from benchmarks.gpu.measure.shapes import MACHINE

    MACHINE.rehearsal = rehearse


def use_emulated_kernels(path: Path) -> None:
    """Route the backend "cuda" to the emulated library."""
    from optical.backends import library
    from tests.cuda_emulator import build as emulator

    emulator.use(library.open_library(path, None), setattr)


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest: test the emulated kernels, which take CPU tensors."""
    use_emulated_kernels(Path(os.environ[LIBRARY_VARIABLE]))


# ---------------------------------------------------------------------------------- torch.cuda


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.time - self.time)


class _Stream:
    cuda_stream = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        pass


# Functions that make a tensor on the host unless they are given a device. Copying it to the device
# waits for the stream, which a capture refuses.
FACTORIES = ("tensor", "arange", "linspace", "full", "zeros", "ones", "empty", "rand", "randn")
# Methods that read a tensor of the device.
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero")


class _Capture:
    """Stand-in for ``torch.cuda.graph``, which refuses what a capture refuses."""

    def __init__(self, graph: _Graph, **options: Any) -> None:
        import torch
        from torch.overrides import TorchFunctionMode

        makes = {getattr(torch, name): name for name in FACTORIES}
        reads = {getattr(torch.Tensor, name): name for name in READS}

        class Refusing(TorchFunctionMode):
            def __torch_function__(
                self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                kwargs = kwargs or {}
                if function in makes and kwargs.get("device") is None:
                    raise RuntimeError(f"a capture refuses torch.{makes[function]} on the host")
                if function in reads and not _is_interpreter_running():
                    raise RuntimeError(f"a capture refuses Tensor.{reads[function]}")
                return function(*args, **kwargs)

        self.mode = Refusing()

    def __enter__(self) -> None:
        self.mode.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)  # type: ignore[no-untyped-call]


def _is_interpreter_running() -> bool:
    """Whether Triton's interpreter is on the stack, which reads tensors as a device would."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "triton.runtime.interpreter":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
