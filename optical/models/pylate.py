"""Export retrievers to folders that PyLate loads.

PyLate has its own folder format and pins versions that exclude Sentence Transformers 6 from its
environment, so models are exchanged as files. The exported folder loads in both libraries.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from optical.io.files import write_json
from optical.models.encoding import ROLES
from optical.models.retriever import load_retriever

# Keys of a projection's configuration that PyLate knows.
_PROJECTION_KEYS = ("in_features", "out_features", "bias", "activation_function")


def export_pylate(name: str | Path, folder: str | Path, *, role: str = "") -> Path:
    """Write a model to a folder that PyLate and Sentence Transformers load, with equal vectors.

    Args:
        name: folder or Hugging Face name of a saved ``MultiVectorEncoder``.
        folder: folder to write, which must be empty or not exist.
        role: "query" or "document": the encoder to export from a model with a Router.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty, or the model has a feature that PyLate lacks: two
            encoders in a Router without ``role``, a prompt of several tokens, words skipped in
            queries, vectors that are not normalised, a query expansion other than a fixed length.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not empty; choose another folder")
    model = load_retriever(name)
    modules = _modules(model, role)
    settings = _settings(model, modules)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        _write(partial, modules, settings)
        # Replaces an empty folder of that name.
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _modules(model: Any, role: str) -> dict[str, list[Any]]:
    """Return the modules of a model, or of one encoder of its Router, by class name."""
    modules = list(model)
    if type(modules[0]).__name__ == "Router":
        if role not in ROLES:
            raise ValueError(
                f"role: {role!r}, expected 'query' or 'document': the model has an encoder for "
                "each, and a PyLate model has one"
            )
        modules = [*modules[0].sub_modules[role], *modules[1:]]
    elif role:
        raise ValueError(f"role: {role!r}, but the model has one encoder for both roles")
    by_class: dict[str, list[Any]] = {}
    for module in modules:
        by_class.setdefault(type(module).__name__, []).append(module)
    if "Transformer" not in by_class or "Normalize" not in by_class:
        raise ValueError(
            f"the model's modules are {', '.join(by_class)}; PyLate has a Transformer, projections "
            "and normalised vectors"
        )
    kinds = [type(module).__name__ for module in modules]
    if "Dense" in kinds[kinds.index("Normalize") :]:
        raise ValueError("the model projects normalised vectors; PyLate normalises only at the end")
    unsupported = by_class.keys() - {"Transformer", "Dense", "MultiVectorMask", "Normalize"}
    if unsupported:
        raise ValueError(f"the model has a module {sorted(unsupported)[0]}, which PyLate lacks")
    return by_class


def _settings(model: Any, modules: dict[str, list[Any]]) -> dict[str, Any]:
    """Return PyLate's ``config_sentence_transformers.json``.

    Raises:
        ValueError: the model has a feature that PyLate lacks.
    """
    (encoder,) = modules["Transformer"]
    prefixes = {}
    for role in ROLES:
        prompt = model.prompts.get(role) or ""
        # PyLate inserts one token after the first, which equals a prompt of one token.
        if prompt and encoder.tokenizer.tokenize(prompt) != [prompt]:
            raise ValueError(
                f"the {role} prompt {prompt!r} is not a single token, and PyLate inserts one token"
            )
        prefixes[role] = prompt
    skipped: list[str] = []
    for mask in modules.get("MultiVectorMask", []):
        if mask.keep_only_token_ids:
            raise ValueError("the model scores listed tokens only, which PyLate cannot do")
        if mask.skiplist_words and "query" in mask.skiplist_tasks:
            raise ValueError(
                f"the model skips {len(mask.skiplist_words)} words in queries, but PyLate skips "
                "words in documents only; train with skip_frequent 0, or export token vectors"
            )
        if "document" in mask.skiplist_tasks:
            skipped += mask.skiplist_words
    expansion = encoder.query_expansion
    if expansion and expansion.get("strategy") != "fixed":
        raise ValueError(
            f"the model expands queries by {expansion}, but PyLate expands them to a fixed length"
        )
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
    # Keys that every release of Sentence Transformers knows.
    limits = {"max_seq_length": encoder.max_seq_length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limits)
    entries = [_entry(0, "", "sentence_transformers.models.Transformer")]
    # PyLate adds a randomly initialised projection to a model without one.
    projections = modules.get("Dense") or [_identity(encoder.get_embedding_dimension())]
    for number, projection in enumerate(projections, start=1):
        path = f"{number}_Dense"
        if getattr(projection, "use_residual", False):
            raise ValueError("the model has a residual projection, which PyLate lacks")
        (folder / path).mkdir()
        projection.save(str(folder / path))
        config = projection.get_config_dict()
        write_json(folder / path / "config.json", {key: config[key] for key in _PROJECTION_KEYS})
        entries.append(_entry(number, path, "pylate.models.Dense.Dense"))
    write_json(folder / "modules.json", entries)
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


def _entry(number: int, path: str, class_name: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": class_name}
