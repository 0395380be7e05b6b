"""Training recipes for Sentence Transformers.

The names are loaded at first use: the recipes import Sentence Transformers, while the options, which
a study's configuration needs, do not.
"""

import importlib
from typing import Any

_HOME = {
    "AverageOptions": "options",
    "BitextCollator": "recipes",
    "CodeswitchOptions": "options",
    "DistillOptions": "options",
    "EncoderOptions": "pretraining",
    "TeacherOptions": "options",
    "TransferOptions": "options",
    "average": "recipes",
    "codeswitch": "recipes",
    "distill": "recipes",
    "encoder_trainer": "pretraining",
    "run": "runner",
    "teacher": "recipes",
    "trainer_arguments": "recipes",
    "transfer": "vocabulary_transfer",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
