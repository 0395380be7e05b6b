"""Training recipes on Sentence Transformers, and their options.

Names are imported on first use: the options are light, while the recipes import Sentence
Transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optical.training.collator import BitextCollator
    from optical.training.options import (
        AverageOptions,
        CodeswitchOptions,
        DistillOptions,
        EncoderOptions,
        TeacherOptions,
        TransferOptions,
    )
    from optical.training.pretraining import encoder_trainer
    from optical.training.recipes import (
        average,
        codeswitch,
        distill,
        teacher,
        trainer_arguments,
    )
    from optical.training.runner import run, save
    from optical.training.vocabulary_transfer import transfer

__all__ = [
    "AverageOptions",
    "BitextCollator",
    "CodeswitchOptions",
    "DistillOptions",
    "EncoderOptions",
    "TeacherOptions",
    "TransferOptions",
    "average",
    "codeswitch",
    "distill",
    "encoder_trainer",
    "run",
    "save",
    "teacher",
    "trainer_arguments",
    "transfer",
]

# The light module comes first, so that options never load the recipes.
_MODULES = ("options", "collator", "recipes", "runner", "pretraining", "vocabulary_transfer")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            namespace = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in namespace:
                return namespace[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
