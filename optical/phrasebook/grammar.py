"""Tables, templates and scenes of the phrasebook: how its sentences are generated and split."""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from itertools import accumulate, combinations

LOW_RESOURCE = ("sw", "so", "tl", "mr")
HIGH_RESOURCE = ("fi", "de", "fr")
LANGUAGES = LOW_RESOURCE + HIGH_RESOURCE
NAMES = {
    "en": "English", "sw": "Swahili", "so": "Somali", "tl": "Tagalog", "mr": "Marathi",
    "fi": "Finnish", "de": "German", "fr": "French",
}  # fmt: skip

# Table of concepts for each slot, in drawing order: the object restricts later slots.
SLOT_TABLES = {
    "what": "objects", "verb": "verbs", "also": "objects", "quality": "qualities",
    "who": "people", "other": "people", "where": "places", "transfer": "transfers",
    "doing": "doings", "time": "times", "number": "numbers",
}  # fmt: skip
_TRIES = 40  # draws per slot before a scene is restarted
# Slot whose gender or noun class selects among the alternatives of another slot.
_AGREES_WITH = {"verb": "who", "transfer": "who", "doing": "who", "quality": "what"}
# Tables whose concept pairs belong to the training, validation or test partition.
_PARTITIONED_TABLES = {
    frozenset(kinds)
    for kinds in (
        ("objects", "people"), ("objects", "places"), ("objects", "qualities"),
        ("objects",), ("people", "places"),
    )
}  # fmt: skip

_PLACEHOLDER = re.compile(r"\{(\w+)(?::(\w+))?(\+)?\}|\[([^\]]*)\]")
_PREPOSITION = re.compile(r"^(?:(?:at|in|on|by|after) )?(?:the )?")

Scene = Mapping[str, str]  # slot -> concept


@dataclass(frozen=True)
class Tables:
    """Contents of the tables.

    Attributes:
        forms: concept -> grammatical form -> language -> cell.
        tables: table -> its concepts.
        table_of: concept -> table.
        verbs: object -> verbs that take it.
        qualities: object -> qualities that it can have.
    """

    forms: dict[str, dict[str, dict[str, str]]]
    tables: dict[str, list[str]]
    table_of: dict[str, str]
    verbs: dict[str, list[str]]
    qualities: dict[str, list[str]]


@cache
def load_tables() -> Tables:
    """Read the tables of the package once per process."""
    forms: dict[str, dict[str, dict[str, str]]] = {}
    tables: dict[str, list[str]] = {}
    for table in sorted({*SLOT_TABLES.values(), "frames"}):
        tables[table] = []
        for row in _read_table(table):
            concept, part = row.pop("id"), row.pop("part")
            if concept not in forms:
                forms[concept] = {}
                tables[table].append(concept)
            first = next(iter(forms[concept].values()), row)
            forms[concept][part] = {
                language: first[language] if cell == "=" else cell for language, cell in row.items()
            }
    uses = _read_table("uses")
    return Tables(
        forms,
        tables,
        {concept: table for table, concepts in tables.items() for concept in concepts},
        {row["object"]: row["verbs"].split() for row in uses},
        {row["object"]: row["qualities"].split() for row in uses},
    )


def _read_table(table: str) -> list[dict[str, str]]:
    path = files("optical.phrasebook") / "tables" / f"{table}.tsv"
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    names = header.split("\t")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


# --- sentences ------------------------------------------------------------------------------------


@cache
def _parse_template(template: str) -> tuple[tuple[str, str, bool, str], ...]:
    """Split a template into (slot, form, second part?, literal); slot or literal is empty."""
    pieces: list[tuple[str, str, bool, str]] = []
    end = 0
    for match in _PLACEHOLDER.finditer(template):
        slot, form, tail, alternatives = match.groups()
        pieces.append(("", "", False, template[end : match.start()]))
        pieces.append((slot or "", form or "", bool(tail), alternatives or ""))
        end = match.end()
    pieces.append(("", "", False, template[end:]))
    return tuple(piece for piece in pieces if any(piece))


@cache
def template_slots(template: str) -> tuple[str, ...]:
    """Return the slots of a template, in order of first occurrence."""
    return tuple(dict.fromkeys(slot for slot, *_ in _parse_template(template) if slot))


def frame_slots(frame: str) -> tuple[str, ...]:
    """Return the slots of a sentence frame."""
    return template_slots(load_tables().forms[frame]["sentence"]["en"])


def _select_agreement(cell: str, head: str, language: str) -> str:
    """Return the alternative of `cell` that agrees with the concept `head`."""
    if "/" not in cell:
        return cell
    return cell.split("/")[int(load_tables().forms[head]["agreement"][language]) - 1]


@cache
def phrase(concept: str, form: str, tail: bool, head: str, language: str) -> str:
    """Return a concept's text in a grammatical form.

    Args:
        concept: a concept of any table.
        form: grammatical form; "" is the first, "bare" has no preposition or article.
        tail: return the second part of a separable verb instead of the first.
        head: concept that the form agrees with, or "".
        language: language code.
    """
    parts = load_tables().forms[concept]
    cell = (parts[form] if form in parts else next(iter(parts.values())))[language]
    if form == "bare":
        cell = _PREPOSITION.sub("", cell).lower()
    verb, _, particle = _select_agreement(cell, head, language).partition(" + ")
    return particle if tail else verb


def fill_template(template: str, scene: Scene, language: str) -> str:
    """Return the text of a template whose slots hold the concepts of a scene."""
    parts = []
    for slot, form, tail, literal in _parse_template(template):
        if slot:
            head = scene.get(_AGREES_WITH.get(slot, ""), "")
            parts.append(phrase(scene[slot], form, tail, head, language))
        else:
            parts.append(_select_agreement(literal, scene.get("who", ""), language))
    # A verb without a second part leaves two spaces, or one before the full stop.
    return " ".join("".join(parts).split()).replace(" .", ".")


def sentence(frame: str, scene: Scene, language: str) -> str:
    """Return the sentence of a frame about a scene."""
    text = fill_template(load_tables().forms[frame]["sentence"][language], scene, language)
    return text[0].upper() + text[1:]


def passage(frames: Iterable[str], scene: Scene, language: str) -> str:
    """Return one sentence per frame, all about the same scene."""
    return " ".join(sentence(frame, scene, language) for frame in frames)


# --- scenes and their partitions ------------------------------------------------------------------


@cache
def pair_partition(first: str, second: str) -> str:
    """Return the partition of two concepts: "train", "validation", "test", or "" for any."""
    tables = load_tables().table_of
    if frozenset((tables[first], tables[second])) not in _PARTITIONED_TABLES:
        return ""
    name = " ".join(sorted((first, second)))
    bucket = int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big") % 20
    return "test" if bucket < 4 else "validation" if bucket == 4 else "train"


def partition_of(concepts: Iterable[str]) -> str:
    """Return the partition of a set of concepts: test before validation before train."""
    partitions = {pair_partition(a, b) for a, b in combinations(sorted(set(concepts)), 2)}
    return next((name for name in ("test", "validation", "train") if name in partitions), "")


@cache
def _weights(table: str, skewed: bool) -> tuple[float, ...]:
    """Return cumulative weights of a table's concepts; skewed weights are 1/rank."""
    concepts = load_tables().tables[table]
    if table == "verbs":
        # Any object can be bought, but only letters and books written. Uniform weights would rarely
        # produce "write", and reciprocal counts would rarely produce "buy".
        uses = Counter(verb for verbs in load_tables().verbs.values() for verb in verbs)
        return tuple(accumulate(uses[verb] ** -0.5 for verb in concepts))
    ranks = list(range(len(concepts)))
    random.Random(f"ranks {table}").shuffle(ranks)
    return tuple(accumulate(1 / (rank + 1) if skewed else 1.0 for rank in ranks))


def draw_concept(table: str, draw: random.Random, skewed: bool) -> str:
    """Draw a concept from a table; `skewed` draws from a long-tailed distribution."""
    weights = _weights(table, skewed)
    return load_tables().tables[table][bisect(weights, draw.random() * weights[-1])]


def _is_plausible(slot: str, concept: str, scene: Scene, frames: Iterable[str]) -> bool:
    """Return whether a concept fits a scene: fish cannot be read, and honey cannot be counted."""
    tables = load_tables()
    if slot in ("other", "also"):
        if concept in scene.values():
            return False
        return slot == "other" or "verb" not in scene or scene["verb"] in tables.verbs[concept]
    if slot == "what":
        return "exist" not in frames or "plural" in tables.forms[concept]
    if slot == "verb":
        return concept in tables.verbs[scene["what"]]
    if slot == "quality":
        return concept in tables.qualities[scene["what"]]
    return True


def is_plausible_scene(frames: Iterable[str], scene: Scene) -> bool:
    """Return whether each concept of a scene fits those of earlier slots."""
    earlier: dict[str, str] = {}
    for slot in SLOT_TABLES:
        if slot in scene:
            if not _is_plausible(slot, scene[slot], earlier, frames):
                return False
            earlier[slot] = scene[slot]
    return True


def draw_scene(
    frames: tuple[str, ...], draw: random.Random, *, skewed: bool, train: bool = False
) -> dict[str, str]:
    """Draw concepts for the slots of some frames; with `train`, from training pairs only."""
    needed = {slot for frame in frames for slot in frame_slots(frame)}
    scene: dict[str, str] = {}
    while len(scene) < len(needed):
        scene = {}
        for slot in SLOT_TABLES:
            if slot not in needed:
                continue
            for _ in range(_TRIES):
                concept = draw_concept(SLOT_TABLES[slot], draw, skewed)
                allowed = not train or all(
                    pair_partition(concept, other) in ("train", "") for other in scene.values()
                )
                if allowed and _is_plausible(slot, concept, scene, frames):
                    scene[slot] = concept
                    break
            else:
                break  # no concept fits the earlier slots: restart the scene
    return scene


def split_words(text: str) -> list[str]:
    """Split a phrasebook text into lower-case words; French ``l'`` and ``d'`` are words.

    Unlike :func:`optical.data.lexicon.tokenize_words`, this keeps other apostrophes in words.
    """
    return [word for word in re.split(r"[\s.,?]+|(?<=\b[ld]')", text.lower()) if word]
