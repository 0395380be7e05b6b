"""Launches of kernels through kept handles, and a probe of whether a device can run any.

Triton looks a kernel up at every launch: it binds and specialises each argument, and compares every
global that the kernel reads. That takes ten times as long as the launch itself. ``launch_kernel``
does so once per variant of a kernel and keeps the launcher of the compiled kernel.
"""

import contextlib
import functools
import io
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from triton import knobs

# What the type and the value of an integer argument decide about a variant.
_IS_ONE, _IS_ALIGNED, _IS_LONG = 1, 2, 4
# Bytes to which Triton assumes an address, or a specialised integer, to be aligned.
_ALIGNMENT = 16


class _Parameters(NamedTuple):
    """The run-time parameters of a kernel, pointers first, and its compile-time parameters.

    Attributes:
        pointers: number of pointers.
        traits: for each parameter that follows them, the traits that select a variant.
        constants: names of the compile-time parameters, in the order of the signature.
    """

    pointers: int
    traits: tuple[int, ...]
    constants: tuple[str, ...]


class _Handle(NamedTuple):
    """A compiled variant: its launcher, the arguments that name it, and its constant arguments."""

    run: Callable[..., None]
    function: tuple[Any, ...]
    constants: tuple[Any, ...]


_dtype, _address = operator.attrgetter("dtype"), Tensor.data_ptr
# By the identity of a kernel: hashing one hashes its source. Kernels live as long as this module.
_parameters: dict[int, _Parameters] = {}
_handles: dict[tuple[Any, ...], _Handle] = {}


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch ``kernel[grid](*arguments, **options)`` on the current device and stream.

    Args:
        kernel: a function decorated with ``triton.jit``, whose pointers precede its numbers and
            these its compile-time parameters.
        grid: numbers of programs.
        *arguments: tensors and numbers for its run-time parameters.
        **options: its compile-time parameters and options of the compiler, which every launch of
            this kernel names in the same order.
    """
    ready = _prepare(kernel, grid, arguments, options)
    if ready is None:
        kernel[grid](*arguments, **options)
    else:
        ready.run(*ready.before, *ready.after)


class RepeatedLaunch:
    """A launch that a run repeats on one stream with other numbers of the same traits."""

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], **options: Any
    ) -> None:
        self.kernel, self.grid, self.tensors, self.options = kernel, grid, tensors, options
        self.ready: _Ready | None = None

    def __call__(self, *numbers: float) -> None:
        """Launch with these numbers for the run-time parameters that follow the pointers."""
        if self.ready is None:
            arguments = (*self.tensors, *numbers)
            self.ready = _prepare(self.kernel, self.grid, arguments, self.options)
            if self.ready is None:
                self.kernel[self.grid](*arguments, **self.options)
                return
        self.ready.run(*self.ready.before, *numbers, *self.ready.handle.constants)


class KeptLaunch:
    """A launch that calls repeat with the same numbers, and other tensors of the same dtypes.

    Its variant depends on nothing but the device and the alignment of the addresses.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: float, **options: Any) -> None:
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        self.handles: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launch with these tensors for the pointers of the kernel."""
        kernel = self.kernel
        if not _observed(kernel):
            pointers = tuple(map(_address, tensors))
            driver = triton.runtime.driver.active
            device = driver.get_current_device()
            key = driver, device, _alignment(pointers)
            kept = self.handles.get(key)
            if kept is not None:
                run, grid, function, after = kept
                run(*grid, driver.get_current_stream(device), *function, *pointers, *after)
                return
            ready = _prepare(kernel, self.grid, (*tensors, *self.numbers), self.options)
            if ready is not None:
                kept = ready.run, ready.before[:3], ready.handle.function, ready.after
                self.handles[key] = kept
                ready.run(*ready.before, *ready.after)
                return
        kernel[self.grid](*tensors, *self.numbers, **self.options)


class _Ready(NamedTuple):
    """A launch whose variant is known: ``run(*before, *after)``."""

    run: Callable[..., None]
    handle: _Handle
    before: tuple[Any, ...]
    after: tuple[Any, ...]


def _prepare(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> _Ready | None:
    """Find the handle of a launch; None if Triton has to launch it, or its interpreter."""
    if _observed(kernel):
        return None
    parameters = _parameters.get(id(kernel))
    if parameters is None:
        parameters = _parameters[id(kernel)] = _parameters_of(kernel)
    tensors, numbers = arguments[: parameters.pointers], arguments[parameters.pointers :]
    pointers = tuple(map(_address, tensors))
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key = (
        id(kernel),
        driver,
        device,
        _alignment(pointers),
        *map(_dtype, tensors),
        *[
            -1
            if type(value) is float
            else traits & (value == 1 or (value & 15 == 0) << 1 | (value >= 2**31) << 2)
            for value, traits in zip(numbers, parameters.traits, strict=True)
        ],
        *options.values(),
    )
    handle = _handles.get(key)
    if handle is None:
        # Compiles the variant, or finds it compiled, without launching it.
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        # A hook of Triton's may keep it from compiling; another launcher takes tensors alone.
        if compiled is None or not type(compiled.run).__module__.startswith("triton."):
            return None
        # No metadata and no hooks: a launch that is observed goes through Triton.
        function = compiled.function, compiled.packed_metadata, None, None, None
        constants = tuple(options[name] for name in parameters.constants)
        handle = _handles[key] = _Handle(compiled.run, function, constants)
    launch = (*(*grid, 1, 1)[:3], driver.get_current_stream(device))
    before = (*launch, *handle.function, *pointers)
    return _Ready(handle.run, handle, before, (*numbers, *handle.constants))


def _alignment(pointers: tuple[int, ...]) -> Any:
    """Return what addresses decide about a variant. New tensors are aligned, as most are."""
    if functools.reduce(operator.or_, pointers) % _ALIGNMENT == 0:
        return True
    return tuple(pointer % _ALIGNMENT == 0 for pointer in pointers)


def _observed(kernel: Any) -> bool:
    """Whether Triton itself has to launch a kernel: in its interpreter, or because of hooks."""
    return not isinstance(kernel, triton.JITFunction) or bool(kernel.pre_run_hooks) or _profiled()


def _profiled() -> bool:
    """Whether a profiler has hooks at launches: it needs what only Triton's own launch tells it."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and getattr(hook, "calls", True)


def _parameters_of(kernel: Any) -> _Parameters:
    run_time = [parameter for parameter in kernel.params if not parameter.is_constexpr]
    pointers = [parameter for parameter in run_time if parameter.name.endswith("_ptr")]
    assert kernel.params[: len(run_time)] == run_time, kernel
    assert run_time[: len(pointers)] == pointers, kernel
    every = _IS_ONE | _IS_ALIGNED | _IS_LONG
    return _Parameters(
        len(pointers),
        tuple(
            _IS_LONG if parameter.do_not_specialize else every
            for parameter in run_time[len(pointers) :]
        ),
        tuple(parameter.name for parameter in kernel.params[len(run_time) :]),
    )


@triton.jit
def probe_kernel(out_ptr):
    """Store a number."""
    tl.store(out_ptr, 1)


def obstacle(device: int) -> str | None:
    """Return the error with which Triton fails to compile or load a kernel, or None.

    Such an error is a missing C compiler, which Triton needs, or a device that its assembler does
    not know.
    """
    try:
        # Triton prints the whole program that its assembler refuses.
        with torch.cuda.device(device), contextlib.redirect_stdout(io.StringIO()):
            # Reading `run` loads the kernel; nothing is launched.
            _ = probe_kernel.warmup(torch.int32, grid=(1,)).run
    except Exception as error:  # Triton has no base class of its errors
        lines = str(error).strip().splitlines() or [""]
        line = next((line for line in lines if "fatal" in line), lines[0]).strip()
        return f"Triton cannot compile for this device ({type(error).__name__}: {line})"
    return None
