"""A standard Sentence Transformers 6 script with OTDistillationLoss and a data set of the hub.

python examples/multi_vector_trainer.py TEACHER STUDENT OUTPUT en-sw
"""

import sys

from datasets import load_dataset
from sentence_transformers import (
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.multi_vector_encoder.evaluation import (
    MultiVectorInformationRetrievalEvaluator,
)

from optical.losses.distillation import OTDistillationLoss
from optical.models.retriever import load_retriever
from optical.training import BitextCollator


class Retrieval(MultiVectorInformationRetrievalEvaluator):
    """The standard evaluator; the teacher encodes queries, the student documents."""

    def compute_all_metrics(self, model, *_, **options):
        return super().compute_all_metrics(self.teacher, corpus_model=model, **options)


def main(teacher, student, output, pairs, held_out, **changes):
    """Train on `pairs`, evaluate on `held_out`: datasets with columns english and non_english."""
    frozen = load_retriever(teacher)
    model = load_retriever(student, dimension=frozen.get_embedding_dimension())
    english, other = (dict(enumerate(held_out[name])) for name in ("english", "non_english"))
    find = Retrieval(english, other, {key: {key} for key in english}, name="held-out")
    find.teacher = frozen
    arguments = {"per_device_train_batch_size": 64, "eval_strategy": "epoch", "report_to": "none"}
    trainer = MultiVectorEncoderTrainer(
        model=model,
        args=MultiVectorEncoderTrainingArguments(output, **{**arguments, **changes}),
        train_dataset=pairs,
        evaluator=find,
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
