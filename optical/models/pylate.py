"""Trained models in the form of PyLate, for its indexes and its users.

PyLate reads folders of its own, and pins versions that exclude Sentence Transformers 6 from its
environment, so models reach it as files. The folder written here loads in both.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from optical.io.files import write_json
from optical.models.encoding import ROLES
from optical.models.retriever import load_retriever

PROJECTION = ("in_features", "out_features", "bias", "activation_function")


def export_pylate(name: str | Path, folder: str | Path, *, side: str = "") -> Path:
    """Write a model as a folder that PyLate and Sentence Transformers load, with equal vectors.

    Args:
        name: a saved ``MultiVectorEncoder``: folder or Hugging Face name.
        folder: where to write; it must not exist, or be empty.
        side: "query" or "document", the part of a model with a Router that is exported.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds something; or the model does what PyLate cannot express: two
            encoders in a Router with no ``side``, a prompt of several tokens, words skipped in
            queries, vectors that are not normalised, another query expansion than a fixed length.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: holds something already; choose another folder")
    model = load_retriever(name)
    modules = _modules(model, side)
    settings = _settings(model, modules)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        _write(partial, modules, settings)
        # An empty folder of that name is replaced.
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _modules(model: Any, side: str) -> dict[str, list[Any]]:
    """The modules of a model, or of one side of its Router, by their kind."""
    found = list(model)
    if type(found[0]).__name__ == "Router":
        if side not in ROLES:
            raise ValueError(
                f"side: {side!r}, expected 'query' or 'document': the model has an encoder for "
                "each, and PyLate has room for one"
            )
        found = [*found[0].sub_modules[side], *found[1:]]
    elif side:
        raise ValueError(f"side: {side!r}, but the model has one encoder for both sides")
    kinds: dict[str, list[Any]] = {}
    for module in found:
        kinds.setdefault(type(module).__name__, []).append(module)
    if "Transformer" not in kinds or "Normalize" not in kinds:
        raise ValueError(
            f"the model's modules are {', '.join(kinds)}; PyLate has a Transformer, projections "
            "and normalised vectors"
        )
    other = kinds.keys() - {"Transformer", "Dense", "MultiVectorMask", "Normalize"}
    if other:
        raise ValueError(f"the model has a module {sorted(other)[0]}, which PyLate lacks")
    return kinds


def _settings(model: Any, modules: dict[str, list[Any]]) -> dict[str, Any]:
    """What PyLate keeps in ``config_sentence_transformers.json``; refuses what it cannot hold."""
    (encoder,) = modules["Transformer"]
    prefixes = {}
    for role in ROLES:
        prompt = model.prompts.get(role) or ""
        # PyLate puts one token behind the first; that is a prompt which is one token.
        if prompt and encoder.tokenizer.tokenize(prompt) != [prompt]:
            raise ValueError(
                f"the {role} prompt {prompt!r} is no single token, and PyLate inserts a token"
            )
        prefixes[role] = prompt
    skipped: list[str] = []
    for mask in modules.get("MultiVectorMask", []):
        if mask.keep_only_token_ids:
            raise ValueError("the model keeps listed tokens only, which PyLate cannot")
        if mask.skiplist_words and "query" in mask.skiplist_tasks:
            raise ValueError(
                f"the model skips {len(mask.skiplist_words)} words in queries, and PyLate skips "
                "words in documents only; train with skip_frequent 0, or export vectors"
            )
        if "document" in mask.skiplist_tasks:
            skipped += mask.skiplist_words
    expansion = encoder.query_expansion
    if expansion and expansion.get("strategy") != "fixed":
        raise ValueError(f"the model expands queries by {expansion}, PyLate to a fixed length")
    limit = encoder.max_seq_length
    return {
        "model_type": "ColBERT",
        "similarity_fn_name": "MaxSim",
        "prompts": {},
        "default_prompt_name": None,
        "query_prefix": prefixes["query"],
        "document_prefix": prefixes["document"],
        "query_length": expansion["length"] if expansion else encoder.query_length or limit,
        "document_length": encoder.document_length or limit,
        "do_query_expansion": bool(expansion),
        "attend_to_expansion_tokens": bool(expansion and expansion.get("attend")),
        "skiplist_words": skipped,
    }


def _write(folder: Path, modules: dict[str, list[Any]], settings: dict[str, Any]) -> None:
    (encoder,) = modules["Transformer"]
    encoder.save(str(folder))
    # The keys that every release of Sentence Transformers knows.
    limits = {"max_seq_length": encoder.max_seq_length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limits)
    listed = [_entry(0, "", "sentence_transformers.models.Transformer")]
    # Without a projection PyLate would add one of random numbers.
    projections = modules.get("Dense") or [_identity(encoder.get_embedding_dimension())]
    for number, projection in enumerate(projections, start=1):
        path = f"{number}_Dense"
        if getattr(projection, "use_residual", False):
            raise ValueError("the model has a residual projection, which PyLate lacks")
        (folder / path).mkdir()
        projection.save(str(folder / path))
        config = projection.get_config_dict()
        write_json(folder / path / "config.json", {key: config[key] for key in PROJECTION})
        listed.append(_entry(number, path, "pylate.models.Dense.Dense"))
    write_json(folder / "modules.json", listed)
    write_json(folder / "config_sentence_transformers.json", settings)


def _identity(width: int) -> Any:
    import torch
    from sentence_transformers.base.modules import Dense

    return Dense(
        in_features=width,
        out_features=width,
        bias=False,
        activation_function=torch.nn.Identity(),
        init_weight=torch.eye(width),
    )


def _entry(number: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": kind}
