"""One line for every error that a user's situation causes; other errors are bugs."""

from __future__ import annotations

import re

from optical.io.files import DISK_FULL_PATTERNS

# Errors with a message for the user, and those told by their names: their modules import PyTorch.
_PLAIN = (ValueError, TypeError, OSError, ImportError)
_PLAIN_NAMES = ("BackendUnsupported",)
# Packages whose errors are failures of a network, and those that store vectors or models.
_NETWORK = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub", "botocore")
_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|DefaultCPUAllocator|bad_alloc", re.I)
_DEVICE = re.compile(r"CUDA error|CUDA driver|HIP error|MPS backend|No CUDA GPUs|NCCL", re.I)
_MISSING = re.compile(r"requires .* (to be )?installed|pip install")


def explain(error: Exception) -> str | None:
    """Return one line with cause and remedy, or None if the error is a bug of this package."""
    cause = _first_line(error)
    package = type(error).__module__.split(".")[0]
    if isinstance(error, UnicodeEncodeError) and error.encoding.lower() not in ("utf-8", "utf8"):
        return f"the terminal cannot show {error.object[error.start]!r}; set PYTHONUTF8=1"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(cause):
        return f"memory ran out ({cause}); use a smaller batch size, shorter texts or fewer of them"
    if any(re.search(pattern, str(error)) for pattern in DISK_FULL_PATTERNS):
        return cause if isinstance(error, OSError) else f"no room to write ({cause}); free some"
    if isinstance(error, OverflowError) or "without overflow" in cause:
        return f"a number is too large ({cause}); choose a smaller one"
    if isinstance(error, RecursionError):
        return f"an input is nested too deeply ({cause})"
    if isinstance(error, _PLAIN) or type(error).__name__ in _PLAIN_NAMES:
        return cause
    if package in _NETWORK:
        return f"the network failed ({cause}); try again, or use a folder on this machine"
    if package in ("safetensors", "safetensors_rust"):
        return f"a file of a model cannot be read or written ({cause})"
    if package in ("lancedb", "lance") or "lance error" in cause.lower():
        return f"the vector database failed ({cause}); check its address and that it is writable"
    if isinstance(error, RuntimeError) and _DEVICE.search(cause):
        return f"the device failed ({cause}); `optical info` shows what works here"
    if isinstance(error, RuntimeError) and _MISSING.search(cause):
        return cause
    return None


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether an interrupt led to an error: extension modules that it hits while they are
    imported raise an ImportError instead.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _first_line(error: Exception) -> str:
    """Return the first line of a message that is not blank, or the name of the error."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
