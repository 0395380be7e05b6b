"""The loss in the Hugging Face Trainer, for plain encoders with vectors of equal size.

python examples/huggingface_trainer.py TEACHER STUDENT en-sw.tsv OUTPUT
"""

import sys

from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from optical import OTAlignmentLoss
from optical.data.pairs import read_bitext


class Distillation(Trainer):
    """Trainer of the student; the teacher is not part of the model, so checkpoints omit it."""

    def __init__(self, teacher, **settings):
        super().__init__(**settings)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.alignment = OTAlignmentLoss(epsilon=0.05)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        english, other = inputs["english"], inputs["other"]
        taught = self.teacher(**english).last_hidden_state
        output = model(**other)
        masks = other["attention_mask"], english["attention_mask"]
        loss = self.alignment(output.last_hidden_state, taught, *masks)
        return (loss, output) if return_outputs else loss


def main(teacher, student, bitext, output, **changes):
    english, other = (AutoTokenizer.from_pretrained(name) for name in (teacher, student))
    reads = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}

    def collate(rows):
        """Tokenise each side with its own model's tokenizer."""
        return {
            "english": english([row["source"] for row in rows], **reads),
            "other": other([row["target"] for row in rows], **reads),
        }

    arguments = {"learning_rate": 2e-5, "per_device_train_batch_size": 64, "report_to": "none"}
    trainer = Distillation(
        teacher=AutoModel.from_pretrained(teacher),
        model=AutoModel.from_pretrained(student),
        args=TrainingArguments(output, remove_unused_columns=False, **{**arguments, **changes}),
        train_dataset=read_bitext(bitext),
        data_collator=collate,
        processing_class=other,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
