"""Training recipes on Sentence Transformers, and their options.

Names are imported on first use: the options are light, while the recipes import Sentence
Transformers.
"""

from typing import TYPE_CHECKING

from optical.io.lazy import on_demand

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
    from optical.training.recipes import codeswitch, distill, teacher, trainer_arguments
    from optical.training.runner import run, save
    from optical.training.vocabulary_transfer import transfer
    from optical.training.weight_average import average

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

if not TYPE_CHECKING:  # a type checker would accept any name
    __getattr__ = on_demand(
        __name__,
        {
            "collator": ("BitextCollator",),
            "options": (
                "AverageOptions",
                "CodeswitchOptions",
                "DistillOptions",
                "EncoderOptions",
                "TeacherOptions",
                "TransferOptions",
            ),
            "pretraining": ("encoder_trainer",),
            "recipes": ("codeswitch", "distill", "teacher", "trainer_arguments"),
            "runner": ("run", "save"),
            "vocabulary_transfer": ("transfer",),
            "weight_average": ("average",),
        },
    )
