"""training.pretraining."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field
from typing import Any

from optical.data.pairs import read_bitext_pairs
from optical.data.texts import read_sentences
from optical.models.tokenizers import SPECIAL_TOKENS, train_tokenizer

logger = logging.getLogger("optical")


@dataclass
class EncoderOptions:
    """Options of `optical train encoder`."""

    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Plain text (a sentence a line) or JSON lines with a key `text`."},
    )
    bitext: list[str] = field(
        default_factory=list,
        metadata={"help": "Parallel sentences, `English TAB other`; read side by side."},
    )
    vocabulary_size: int = field(default=20_000, metadata={"help": "WordPiece units."})
    hidden_size: int = field(default=128, metadata={"help": "Width; also the token vectors' size."})
    layers: int = field(default=2, metadata={"help": "Transformer layers."})
    heads: int = field(default=2, metadata={"help": "Attention heads."})
    max_tokens: int = field(default=128, metadata={"help": "Longest text in training, in tokens."})
    mask_probability: float = field(default=0.15, metadata={"help": "Share of masked tokens."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint."})

    def validate(self) -> None:
        """Raise ValueError for options that cannot work, before anything is read."""
        if not self.text and not self.bitext:
            raise ValueError("text, bitext: no file given, expected at least one")
        if self.hidden_size % self.heads:
            raise ValueError(
                f"heads: {self.heads}, expected a divisor of hidden_size {self.hidden_size}"
            )


def new_encoder(options: EncoderOptions, vocabulary_size: int) -> Any:
    """Build an untrained encoder with a masked-language head for `vocabulary_size` units."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    ids = {name.strip("[]").lower(): index for index, name in enumerate(SPECIAL_TOKENS)}
    config = ModernBertConfig(
        vocab_size=vocabulary_size,
        hidden_size=options.hidden_size,
        # The feed-forward part is gated, so two widths are as large as the usual four.
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=512,
        layer_types=["full_attention"] * options.layers,
        pad_token_id=ids["pad"],
        cls_token_id=ids["cls"],
        sep_token_id=ids["sep"],
        bos_token_id=ids["cls"],
        eos_token_id=ids["sep"],
        # Only masked tokens have a loss; logits of the others would be most of the work.
        sparse_prediction=True,
    )
    return ModernBertForMaskedLM(config)


def encoder_trainer(options: EncoderOptions, args: Any) -> Any:
    """Configure the masked-language training of a new tokenizer and encoder.

    Args:
        options: texts and sizes.
        args: ``transformers.TrainingArguments``; ``max_steps=0`` is not a training and is refused
            by the Trainer, use one step for an untrained encoder.

    Returns:
        A ``transformers.Trainer`` whose model saves as an ordinary Hugging Face folder.
    """
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, set_seed

    options.validate()
    texts = [text for path in options.text for text in read_sentences(path)]
    pairs = [pair for path in options.bitext for pair in read_bitext_pairs(path)]
    tokenizer = train_tokenizer(
        itertools.chain(texts, itertools.chain.from_iterable(pairs)),
        options.vocabulary_size,
        options.max_tokens,
    )
    set_seed(args.seed)
    model = new_encoder(options, len(tokenizer))
    limits = {"truncation": True, "max_length": options.max_tokens}
    rows: list[list[int]] = []
    if texts:
        rows += tokenizer(texts, **limits)["input_ids"]
    if pairs:
        english, other = (list(side) for side in zip(*pairs, strict=True))
        rows += tokenizer(english, other, **limits)["input_ids"]
    logger.info(
        "encoder: %d texts, %d pairs, %d units, %.1f M parameters",
        len(texts),
        len(pairs),
        len(tokenizer),
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=options.mask_probability
        ),
        processing_class=tokenizer,
    )
