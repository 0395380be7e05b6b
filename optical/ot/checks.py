"""Checks of tensor arguments. Messages name the argument, its value and the expected value.

Checks never synchronise with a device: values are inspected only where ``values_available``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# A subclass may mean anything by its values; these two mean what a tensor means.
CONCRETE = (Tensor, torch.nn.Parameter)


def tracing() -> bool:
    """Whether the call is being compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def dispatched() -> bool:
    """Whether a dispatch mode or a transform of ``torch.func`` sees every operation."""
    return bool(torch._C._len_torch_dispatch_stack()) or (
        torch._C._are_functorch_transforms_active()
    )


def values_available(tensor: Tensor) -> bool:
    """Whether the values can be read without a device sync and outside tracing."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # A fake tensor is of another type; under vmap, one tensor represents many.
    return (
        type(tensor) in CONCRETE
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_floating(name: str, value: Any, layout: str, dim: int, *, least: bool = False) -> None:
    """Raise unless ``value`` is a dense floating-point tensor of ``dim`` dimensions.

    ``least``: or more dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {_type_name(value)}; expected a tensor {layout}")
    if value.dtype not in FLOATING:
        expected = "float64, float32, float16 or bfloat16"
        raise TypeError(f"{name} has dtype {value.dtype}; expected {expected}")
    if value.layout is not torch.strided or value.is_nested:
        found = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        hint = "; pad it, or pack it and pass cu_seqlens" if value.is_nested else ""
        raise TypeError(f"{name} is a {found} tensor; expected a dense tensor {layout}{hint}")
    if value.dim() != dim and not (least and value.dim() > dim):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {layout}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on the same device."""
    if value.device != other.device:
        expected = f"{other.device}, where {other_name} is"
        raise ValueError(f"{name} is on {value.device}; expected {expected}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], reason: str) -> None:
    """Raise unless the tensor has exactly this shape; ``reason`` ends the message."""
    if value.shape != shape:
        found, expected = tuple(value.shape), tuple(shape)
        raise ValueError(f"{name} has shape {found}; expected {expected}, {reason}")


def check_integers(name: str, value: Any, layout: str) -> None:
    """Raise unless ``value`` is an integer tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {_type_name(value)}; expected an integer tensor {layout}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {value.dtype}; expected int64 or int32")


def _type_name(value: Any) -> str:
    kind = type(value)
    return "numpy array" if kind.__module__ == "numpy" else kind.__name__
