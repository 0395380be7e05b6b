"""The loss in PyTorch Lightning, for plain encoders with vectors of equal size.

python examples/lightning_module.py TEACHER STUDENT en-sw.tsv OUTPUT
"""

import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from optical import OTAlignmentLoss
from optical.data.pairs import read_bitext_pairs


class Distillation(lightning.LightningModule):
    def __init__(self, teacher, student, learning_rate=2e-5):
        super().__init__()
        self.student = AutoModel.from_pretrained(student).train()
        # Lightning preserves the train or eval mode of each module.
        self.teacher = AutoModel.from_pretrained(teacher).requires_grad_(False).eval()
        self.alignment = OTAlignmentLoss(epsilon=0.05)
        self.learning_rate = learning_rate

    def training_step(self, batch, _):
        english, other = batch
        taught = self.teacher(**english).last_hidden_state
        learnt = self.student(**other).last_hidden_state
        loss = self.alignment(learnt, taught, other["attention_mask"], english["attention_mask"])
        self.log("ot_cost", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=self.learning_rate)


def main(teacher, student, bitext, output, learning_rate=2e-5, batch_size=64, **settings):
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (teacher, student)]

    def collate(pairs):
        """Tokenise each side with its own model's tokenizer."""
        reads = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        sides = zip(tokenizers, zip(*pairs, strict=True), strict=True)
        return [tokenizer(list(texts), **reads) for tokenizer, texts in sides]

    pairs = DataLoader(
        read_bitext_pairs(bitext), batch_size=batch_size, shuffle=True, collate_fn=collate
    )
    module = Distillation(teacher, student, learning_rate)
    trainer = lightning.Trainer(**{"max_epochs": 1, "default_root_dir": output, **settings})
    trainer.fit(module, pairs)
    module.student.save_pretrained(output)
    tokenizers[1].save_pretrained(output)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
