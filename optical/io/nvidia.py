"""The driver of NVIDIA devices: its calls and errors, and why a device cannot be used."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The oldest compute capability that the kernels are written for.
LEAST_CAPABILITY = (8, 0)
DRIVER = "libcuda.so.1"


class DriverError(RuntimeError):
    """The CUDA driver refused a call; the message is the driver's own text."""


class DeviceAttribute(enum.IntEnum):
    """The values of CUdevice_attribute used here."""

    COMPUTE_CAPABILITY_MAJOR = 75
    COMPUTE_CAPABILITY_MINOR = 76
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97


RELAXED_CAPTURE = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Driver:
    """The CUDA driver, with statuses turned into exceptions.

    Args:
        library: libcuda, or a test double.
        current_device: returns the device that PyTorch uses in this thread.
    """

    def __init__(
        self, library: Any, current_device: Callable[[], int] = torch.cuda.current_device
    ) -> None:
        self.library, self.current_device = library, current_device

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            DriverError: the function returned an error.
        """
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise DriverError(self.text(status))

    def text(self, status: int) -> str:
        """Return the name and the description of an error, as the driver writes them."""
        texts = []
        for function in (self.library.cuGetErrorName, self.library.cuGetErrorString):
            text = ctypes.c_char_p()
            if function(status, ctypes.byref(text)) == 0 and text.value:
                texts.append(text.value.decode(errors="replace"))
        return ": ".join(texts) or f"error {status}"

    def version(self) -> str:
        """Return the newest version of CUDA that the driver supports, such as "13.0"."""
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return version_text(version.value)

    def attribute(self, name: DeviceAttribute, device: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), name, device)
        return value.value

    def capability(self, device: int) -> tuple[int, int]:
        major = self.attribute(DeviceAttribute.COMPUTE_CAPABILITY_MAJOR, device)
        return major, self.attribute(DeviceAttribute.COMPUTE_CAPABILITY_MINOR, device)

    def current(self) -> int:
        """Return the device of this thread, whose primary context becomes current if none is.

        In a thread of autograd that has not called CUDA yet, no context is current.
        """
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self.call("cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            device.value = self.current_device()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self.call("cuCtxSetCurrent", context)
            return device.value
        self.call("cuCtxGetDevice", ctypes.byref(device))
        return device.value

    @contextlib.contextmanager
    def relaxed_capture(self) -> Iterator[None]:
        """Allow this thread to load code while a CUDA graph is being captured."""
        mode = ctypes.c_int(RELAXED_CAPTURE)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def version_text(number: int) -> str:
    """Write a version of CUDA, such as 12040, as "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


# ---------------------------------------------------------------------------------------- devices


def missing_device() -> str | None:
    """Return why PyTorch can use no NVIDIA device, or None if it can."""
    if torch.version.hip is not None:
        return f"this PyTorch is built for AMD devices (ROCm {torch.version.hip})"
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if torch.cuda.is_available():
        return None
    try:
        driver = Driver(ctypes.CDLL(DRIVER))
    except OSError:
        return f"no NVIDIA driver is installed ({DRIVER} cannot be loaded)"
    try:
        driver.call("cuInit", 0)
        supported = driver.version()
    except DriverError as error:
        return f"the NVIDIA driver finds no device ({error})"
    if _numbers(supported) < _numbers(torch.version.cuda):
        return (
            f"the NVIDIA driver supports CUDA {supported}, and this PyTorch is built for "
            f"{torch.version.cuda}; update the driver, or install PyTorch for an older CUDA"
        )
    return "PyTorch finds no CUDA device"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@functools.cache
def capability_obstacle(device: int) -> str | None:
    """Return why a device is too old for the kernels, or None; asked once per device.

    AMD devices are not judged.
    """
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    least, found = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {found}; the kernels need {least} or newer"
