"""Triton's own launcher on CPU tensors, over a CUDA driver that does nothing.

The compiler, the launcher and everything above them are real; only the entry points of
``libcuda.so.1`` are those of ``idle_driver.c``. For a process of its own: the driver stays.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

CAPABILITY = 9, 0


def install() -> Any:
    """Make the idle driver Triton's, and return its library, which counts ``idle_launches``.

    Call it before Triton is imported. Afterwards ``backend="triton"`` serves CPU tensors.

    Raises:
        RuntimeError: the driver cannot be compiled.
    """
    folder = Path(tempfile.mkdtemp(prefix="idle-driver-"))
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("idle_driver.c")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    try:
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"the idle driver cannot be compiled: {error}") from error
    (folder / "libcuda.so").symlink_to(library.name)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    from optical.backends import registry

    class IdleDriver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: CAPABILITY
            self.set_current_device = lambda device: None

    def runs_triton(tensor: Tensor) -> bool:
        return True

    driver.set_active(IdleDriver())
    registry.runs_triton = runs_triton
    return loaded


def launches(library: Any) -> int:
    """The number of launches so far."""
    return ctypes.c_long.in_dll(library, "idle_launches").value
