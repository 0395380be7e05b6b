"""Batched, masked Sinkhorn for token vectors, and a loss and a retrieval package built on it.

The names below, and those that the wings ``backends``, ``data``, ``losses``, ``models``,
``retrieval``, ``study``, ``testing`` and ``training`` export, are public. The first use of a name
imports PyTorch, which is all that the package needs. Importing the package queries no device,
compiles nothing, and loads neither Triton nor the compiled libraries.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from optical.io.lazy import on_demand

if TYPE_CHECKING:
    from optical.backends.problem import Status
    from optical.backends.registry import BackendUnsupported
    from optical.losses.alignment import OTAlignmentLoss
    from optical.losses.divergence import SinkhornDivergence, sinkhorn_divergence
    from optical.losses.warmup import warmup
    from optical.ot.functional import ot_alignment, sinkhorn, sinkhorn_vectors
    from optical.ot.result import SinkhornResult

__version__ = "0.1.0"

__all__ = [
    "BackendUnsupported",
    "OTAlignmentLoss",
    "SinkhornDivergence",
    "SinkhornResult",
    "Status",
    "__version__",
    "ot_alignment",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_vectors",
    "warmup",
]

# The command line imports this package first, and most of its commands need no PyTorch.
_names = on_demand(
    __name__,
    {
        "backends.problem": ("Status",),
        "backends.registry": ("BackendUnsupported",),
        "losses.alignment": ("OTAlignmentLoss",),
        "losses.divergence": ("SinkhornDivergence", "sinkhorn_divergence"),
        "losses.warmup": ("warmup",),
        "ot.functional": ("ot_alignment", "sinkhorn", "sinkhorn_vectors"),
        "ot.result": ("SinkhornResult",),
    },
    wings=(
        "backends",
        "data",
        "losses",
        "models",
        "ot",
        "retrieval",
        "study",
        "testing",
        "training",
    ),
)


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        value = globals()[name] = _names(name)  # From now on, the name needs no function.
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Where PyTorch is loaded already, register the operators, which `torch.export.load` looks up.
if "torch" in sys.modules:
    importlib.import_module("optical.ot")
