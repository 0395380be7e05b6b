"""Training recipes on Sentence Transformers, and their options.

Names are imported on first use: the options are light, while the recipes import Sentence
Transformers.
"""

import importlib
from typing import Any

_MODULES = {
    "options": (
        "AverageOptions",
        "CodeswitchOptions",
        "DistillOptions",
        "EncoderOptions",
        "TeacherOptions",
        "TransferOptions",
    ),
    "pretraining": ("encoder_trainer",),
    "recipes": (
        "BitextCollator",
        "average",
        "codeswitch",
        "distill",
        "teacher",
        "trainer_arguments",
    ),
    "runner": ("run", "save"),
    "vocabulary_transfer": ("transfer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
