"""Masked-language pre-training of a tokenizer and a small multilingual encoder from plain text.

It serves languages and machines without a pre-trained model. The encoder has the shape of
ModernBERT: pre-normalisation passes the vector of a word to the output unchanged, so that a shallow
model learns word translations quickly. The two sentences of a pair are read as one text
(translation language modelling: Conneau and Lample, 2019).
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from optical.data.pairs import read_bitext_pairs
from optical.data.texts import read_sentences
from optical.models.tokenizers import SPECIAL_TOKENS, train_tokenizer
from optical.training.options import EncoderOptions

logger = logging.getLogger("optical")


def encoder_trainer(options: EncoderOptions, trainer_args: Any) -> Any:
    """Configure the masked-language training of a new tokenizer and encoder.

    Args:
        options: texts and sizes.
        trainer_args: ``transformers.TrainingArguments``. The Trainer refuses ``max_steps=0``; one
            step gives a nearly untrained encoder.

    Returns:
        A ``transformers.Trainer`` whose model is saved as an ordinary Hugging Face folder.
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
    set_seed(trainer_args.seed)
    model = new_encoder(options, len(tokenizer))
    limits = {"truncation": True, "max_length": options.max_tokens}
    input_ids: list[list[int]] = []
    if texts:
        input_ids += tokenizer(texts, **limits)["input_ids"]
    if pairs:
        english, other = (list(sentences) for sentences in zip(*pairs, strict=True))
        input_ids += tokenizer(english, other, **limits)["input_ids"]
    logger.info(
        "encoder: %d texts, %d pairs, %d units, %.1f M parameters",
        len(texts),
        len(pairs),
        len(tokenizer),
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
    )
    return Trainer(
        model=model,
        args=trainer_args,
        train_dataset=Dataset.from_dict({"input_ids": input_ids}),
        data_collator=DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=options.mask_probability
        ),
        processing_class=tokenizer,
    )


def new_encoder(options: EncoderOptions, vocabulary_size: int) -> Any:
    """Build an untrained encoder with a masked-language head for `vocabulary_size` units."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    ids = {name.strip("[]").lower(): index for index, name in enumerate(SPECIAL_TOKENS)}
    config = ModernBertConfig(
        vocab_size=vocabulary_size,
        hidden_size=options.hidden_size,
        # The feed-forward layer is gated: two widths have the parameters of the usual four.
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
        # Only masked tokens have a loss; computing all logits would dominate the run time.
        sparse_prediction=True,
    )
    return ModernBertForMaskedLM(config)
