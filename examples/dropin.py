"""The loss in a plain PyTorch loop: two encoders, two vocabularies, sentences of unequal length.

The "languages" are toys. A sentence is a list of concepts. The teacher knows a word for each of
them. The student's language has its own words, puts them in another order, and splits every third
one into two pieces. Only torch is needed: python examples/dropin.py
"""

import torch
from torch import Tensor, nn

from optical import OTAlignmentLoss

CONCEPTS, LONGEST, DIM = 60, 8, 32


class Encoder(nn.Module):
    """Word vectors, and a little of the neighbours' context."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, DIM)
        self.context = nn.Conv1d(DIM, DIM, kernel_size=3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.words(ids)
        return words + 0.3 * self.context(words.mT).mT


def english(concepts: list[int]) -> list[int]:
    return concepts


def other(concepts: list[int]) -> list[int]:
    pieces = ([2 * c, 2 * c + 1] if c % 3 == 0 else [2 * c] for c in reversed(concepts))
    return [piece for word in pieces for piece in word]


def batch(sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Padded ids and the mask of the real ones."""
    longest = max(map(len, sentences))
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sentences])
    lengths = torch.tensor([len(ids) for ids in sentences])
    return ids, torch.arange(longest) < lengths[:, None]


def main(steps: int = 120) -> tuple[float, float]:
    """Train the student; return the mean loss of the first and of the last ten steps."""
    torch.manual_seed(0)
    teacher, student = Encoder(CONCEPTS), Encoder(2 * CONCEPTS)
    alignment = OTAlignmentLoss(epsilon=0.05)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.03)
    losses = []
    for step in range(steps):
        lengths = torch.randint(3, LONGEST + 1, (16,)).tolist()
        meanings = [torch.randint(CONCEPTS, (length,)).tolist() for length in lengths]
        teacher_ids, teacher_mask = batch([english(meaning) for meaning in meanings])
        student_ids, student_mask = batch([other(meaning) for meaning in meanings])
        with torch.no_grad():
            taught = teacher(teacher_ids)
        loss = alignment(student(student_ids), taught, student_mask, teacher_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 30 == 0 or step == steps - 1:
            print(f"step {step:3}  transported cosine distance {losses[-1]:.3f}")
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    main()
