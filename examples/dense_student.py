"""Distil into a dense SentenceTransformer by its token vectors before pooling.

python examples/dense_student.py TEACHER STUDENT OUTPUT en-sw
"""

import sys

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import MSEEvaluator

from optical.losses.distillation import OTDistillationLoss
from optical.training import BitextCollator


def main(teacher, student, output, pairs, held_out, **changes):
    """Train on `pairs`, evaluate on `held_out`: datasets with columns english and non_english."""
    frozen, model = SentenceTransformer(teacher), SentenceTransformer(student)
    sides = list(held_out["english"]), list(held_out["non_english"])
    arguments = {"per_device_train_batch_size": 64, "eval_strategy": "epoch", "report_to": "none"}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output, **{**arguments, **changes}),
        train_dataset=pairs,
        # Pooled vectors follow their tokens: the student's approach the teacher's.
        evaluator=MSEEvaluator(*sides, teacher_model=frozen, name="held-out"),
        loss=OTDistillationLoss(model, frozen, epsilon=0.05),
        # The first column is the teacher's; the student will encode documents.
        data_collator=BitextCollator(model, frozen, role="document"),
    )
    trainer.train()
    model.save_pretrained(f"{output}/final")
    return trainer


if __name__ == "__main__":
    *models, languages = sys.argv[1:]
    talks = load_dataset("sentence-transformers/parallel-sentences-talks", languages)
    main(*models, talks["train"], talks["dev"])
