"""Fingerprints of models by content, and the check that two models share a vector space.

Whatever stores token vectors records the fingerprint of the model that made them. A model that was
trained to share the vector space of another one, its partner, records the partner's fingerprints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optical.io.files import read_json, write_json
from optical.io.fingerprints import fingerprint
from optical.models.encoding import ROLES

# File in the folder of a model with the fingerprints of its partners.
PARTNERS = "partners.json"
# Entries of a configuration that do not affect the vectors, or differ between equal models.
_WITHOUT_EFFECT = (
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("use_cache", "attn_implementation", "_attn_implementation"),
)


def fingerprints(model: Any) -> dict[str, str]:
    """Return the fingerprint of a model for each role, "query" and "document".

    A fingerprint is a hash of everything that determines the vectors of a text: weights, tokenizer,
    prompt, lengths and the settings of all modules. Of a Router it covers the role's encoder, so
    that the fingerprint equals the one of that encoder alone. It does not depend on the device, on
    the folder, or on saving and loading.
    """
    cache: dict[int, list[str]] = {}
    return {
        role: fingerprint(
            [
                [_module_fingerprint(module, role, cache) for module in _modules(model, role)],
                (getattr(model, "prompts", None) or {}).get(role) or "",
                getattr(model, "default_prompt_name", None),
            ]
        )
        for role in ROLES
    }


def _modules(model: Any, role: str) -> list[Any]:
    """Return the modules that a text of a role passes."""
    modules: list[Any] = []
    for module in model if isinstance(model, torch.nn.Sequential) else [model]:
        routes = getattr(module, "sub_modules", None)
        modules += list(routes[role]) if routes is not None and role in routes else [module]
    return modules


def _module_fingerprint(module: Any, role: str, cache: dict[int, list[str]]) -> list[str]:
    """Return what identifies a module for a role; weights and tokenizer are hashed once."""
    if id(module) not in cache:
        tokenizer = getattr(module, "tokenizer", None)
        rules = "" if tokenizer is None else tokenizer_fingerprint(tokenizer)
        cache[id(module)] = [type(module).__name__, _hash_weights(module), rules]
    settings = json.dumps(_settings(module, role), sort_keys=True, default=str)
    return [*cache[id(module)], settings]


def _settings(module: Any, role: str) -> dict[str, Any]:
    """Return the settings of a module that affect the texts of a role."""
    settings: dict[str, Any] = {}
    if hasattr(module, "get_config_dict"):
        settings |= module.get_config_dict()
    encoder = getattr(module, "auto_model", module)
    config = getattr(encoder, "config", None)
    if hasattr(config, "to_diff_dict"):
        differing = config.to_diff_dict()  # type: ignore[union-attr]
        settings["config"] = {k: v for k, v in differing.items() if k not in _WITHOUT_EFFECT}
    for other in ROLES:
        if other != role:
            settings.pop(f"{other}_length", None)
    if role != "query":
        settings.pop("query_expansion", None)
    if role not in settings.get("skiplist_tasks", [role]):
        settings.pop("skiplist_words", None)
    return settings


def _hash_weights(module: Any) -> str:
    digest = hashlib.sha256()
    state = module.state_dict() if isinstance(module, torch.nn.Module) else {}
    for name, value in sorted(state.items()):
        # A pooler does not affect token vectors, and is new and random where a checkpoint has none.
        if isinstance(value, Tensor) and ".pooler." not in name:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a fingerprint of a Transformers tokenizer: vocabulary, rules and length limit."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = None
    if backend is not None:
        rules = json.loads(backend.to_str())
        # The state of the last call.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    elif hasattr(tokenizer, "get_vocab"):
        rules = [type(tokenizer).__name__, tokenizer.get_vocab()]
    limit = getattr(tokenizer, "model_max_length", None)
    special = {k: str(v) for k, v in getattr(tokenizer, "special_tokens_map", {}).items()}
    return fingerprint([rules, limit, special])


def partners(model: Any) -> tuple[str, ...]:
    """Return the fingerprints of the models whose vector space a model was made to share."""
    return tuple(getattr(model, "partners", ()))


def set_partners(model: Any, known: Iterable[str]) -> None:
    """Record the partners of a model; saving it with its recipe writes them beside the weights."""
    model.partners = tuple(sorted(set(known)))


def save_partners(model: Any, folder: str | Path) -> None:
    """Write the partners of a model into its folder; nothing if it has none."""
    if partners(model):
        write_json(Path(folder) / PARTNERS, list(partners(model)))


def load_partners(model: Any, folder: str | Path) -> None:
    """Read the partners of a model from its folder, if they are recorded there."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        set_partners(model, map(str, read_json(Path(folder) / PARTNERS)))


def share_space(model: Any, stored: str, stored_partners: Collection[str]) -> bool:
    """Return whether a query model is known to share the space of stored document vectors.

    It is if it encodes documents as the model of the vectors does, if one of the two was distilled
    from the other or made from it, or if both have a common partner.

    Args:
        model: model of the queries.
        stored: fingerprint of the model that made the stored vectors.
        stored_partners: partners of that model.
    """
    own, known = fingerprints(model), partners(model)
    return (
        stored == own["document"]
        or stored in known
        or own["query"] in stored_partners
        or bool(set(known) & set(stored_partners))
    )
