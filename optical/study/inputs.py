"""Data and models that a study reads, identified by their content for the report's provenance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optical.io.fingerprints import file_digest, fingerprint
from optical.models.retriever import resolve_model
from optical.study.arms import fill_languages
from optical.study.settings import COLLECTION_FILES, StudyConfig

# Digits of a SHA-256 that the report shows.
DIGITS = 12


def identify_inputs(config: StudyConfig) -> dict[str, str]:
    """Return file, folder or model -> its identity, for everything that a configuration names.

    The identity is the beginning of the SHA-256 of a file, or of a list of the files of a folder
    with theirs. A model of the Hugging Face hub is identified by the commit in the local cache, and
    left out if it is not there yet.
    """
    languages = (*config.languages, *config.ceiling)
    found: dict[str, str] = {}
    for name in _names(config, languages):
        if name not in found and (identity := _identity(name)):
            found[name] = identity
    return found


def _names(config: StudyConfig, languages: tuple[str, ...]) -> Iterator[str]:
    """Yield every string of the configuration that may name data or a model."""
    sources: list[Any] = [config.encoder, config.teacher]
    sources += [vars(x) for x in (config.encoder_options, config.teacher_options) if x]
    for arm in config.arms:
        sources += [() if arm.members else arm.options, arm.replace, arm.translate]
    sources += [vars(lexicon) for lexicon in config.lexicons.values()]
    sources.append(config.word_alignment or {})
    for parts in config.collections.values():
        sources.append([parts[part] for part in COLLECTION_FILES if part in parts])
    for text in _strings(sources):
        for collection in config.collections if "{collection}" in text else [""]:
            for name in fill_languages([text.replace("{collection}", collection)], languages):
                # `language=file`, or two aligned files.
                yield from name.rpartition("=")[2].split(",")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)
    elif isinstance(value, str) and value:
        yield value


def _identity(name: str) -> str:
    path = Path(resolve_model(name))
    if path.is_file():
        return file_digest(path)[:DIGITS]
    if path.is_dir():
        files = sorted(found for found in path.rglob("*") if found.is_file())
        listed = [(found.relative_to(path).as_posix(), file_digest(found)) for found in files]
        return fingerprint(listed)
    return _cached_commit(name)


def _cached_commit(name: str) -> str:
    """Return the commit of a hub model in the local cache, or ""."""
    if name.count("/") > 1 or name.startswith((".", "/")) or "/" not in name:
        return ""
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):
        return ""
    # .../models--OWNER--NAME/snapshots/COMMIT/config.json
    return os.path.basename(os.path.dirname(cached))[:DIGITS] if isinstance(cached, str) else ""
