"""The loss in a plain PyTorch loop, on toy languages: only torch is needed.

A sentence is a list of concepts. The teacher's language has one token per concept. The student's
language has other tokens, reverses the order, and splits every third concept into two tokens.
"""

import torch
from torch import Tensor, nn

from optical import OTAlignmentLoss

CONCEPTS, LONGEST, DIM = 60, 8, 32


class Encoder(nn.Module):
    """Token embeddings with a small convolutional context."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, DIM)
        self.context = nn.Conv1d(DIM, DIM, kernel_size=3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.words(ids)
        return words + 0.3 * self.context(words.mT).mT


def translated(concepts: list[int]) -> list[int]:
    pieces = ([2 * c, 2 * c + 1] if c % 3 == 0 else [2 * c] for c in reversed(concepts))
    return [piece for word in pieces for piece in word]


def padded(sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (batch, tokens), and the mask of real tokens."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sentences], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in sentences])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def main(steps: int = 120) -> list[float]:
    torch.manual_seed(0)
    teacher, student = Encoder(CONCEPTS).requires_grad_(False), Encoder(2 * CONCEPTS)
    alignment, losses = OTAlignmentLoss(epsilon=0.05), []
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.03)
    for _ in range(steps):
        lengths = torch.randint(3, LONGEST + 1, (16,)).tolist()
        meanings = [torch.randint(CONCEPTS, (length,)).tolist() for length in lengths]
        english, english_mask = padded(meanings)
        other, other_mask = padded([translated(meaning) for meaning in meanings])
        loss = alignment(student(other), teacher(english), other_mask, english_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("transported cosine distance, every tenth step:", main()[::10])
