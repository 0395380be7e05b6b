"""phrasebook.grammar."""

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

# The table that fills each slot of a frame, in the order of drawing: objects restrict the others.
_SLOTS = {
    "what": "objects", "verb": "verbs", "also": "objects", "quality": "qualities",
    "who": "people", "other": "people", "where": "places", "transfer": "transfers",
    "doing": "doings", "time": "times", "number": "numbers",
}  # fmt: skip
_TRIES = 40  # draws for one slot before a scene is begun anew
# Which slot's gender or noun class chooses among the alternatives of another.
_AGREES_WITH = {"verb": "who", "transfer": "who", "doing": "who", "quality": "what"}
_KEY_PAIRS = {
    frozenset(kinds)
    for kinds in (
        ("objects", "people"), ("objects", "places"), ("objects", "qualities"),
        ("objects",), ("people", "places"),
    )
}  # fmt: skip

_SLOT = re.compile(r"\{(\w+)(?::(\w+))?(\+)?\}|\[([^\]]*)\]")
_BARE = re.compile(r"^(?:(?:at|in|on|by|after) )?(?:the )?")

Scene = Mapping[str, str]  # slot -> concept


@dataclass(frozen=True)
class _Book:
    """The tables in memory."""

    forms: dict[str, dict[str, dict[str, str]]]  # concept -> part -> language -> cell
    tables: dict[str, list[str]]  # table -> its concepts
    table_of: dict[str, str]  # concept -> table
    verbs: dict[str, list[str]]  # object -> what one can do with it
    qualities: dict[str, list[str]]  # object -> how it can be


@cache
def _book() -> _Book:
    forms: dict[str, dict[str, dict[str, str]]] = {}
    tables: dict[str, list[str]] = {}
    for table in sorted({*_SLOTS.values(), "frames"}):
        tables[table] = []
        for row in _rows(table):
            concept, part = row.pop("id"), row.pop("part")
            if concept not in forms:
                forms[concept] = {}
                tables[table].append(concept)
            first = next(iter(forms[concept].values()), row)
            forms[concept][part] = {
                language: first[language] if cell == "=" else cell for language, cell in row.items()
            }
    uses = _rows("uses")
    return _Book(
        forms,
        tables,
        {concept: table for table, concepts in tables.items() for concept in concepts},
        {row["object"]: row["verbs"].split() for row in uses},
        {row["object"]: row["qualities"].split() for row in uses},
    )


def _rows(table: str) -> list[dict[str, str]]:
    path = files("optical") / "phrasebook" / "tables" / f"{table}.tsv"
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    names = header.split("\t")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


# --- sentences ------------------------------------------------------------------------------------


@cache
def _template(template: str) -> tuple[tuple[str, str, bool, str], ...]:
    """Cut a frame into (slot, form, second part?, literal); a slot or a literal is empty."""
    pieces: list[tuple[str, str, bool, str]] = []
    end = 0
    for found in _SLOT.finditer(template):
        slot, form, tail, alternatives = found.groups()
        pieces.append(("", "", False, template[end : found.start()]))
        pieces.append((slot or "", form or "", bool(tail), alternatives or ""))
        end = found.end()
    pieces.append(("", "", False, template[end:]))
    return tuple(piece for piece in pieces if any(piece))


@cache
def _slots(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(slot for slot, *_ in _template(template) if slot))


def _frame_slots(frame: str) -> tuple[str, ...]:
    return _slots(_book().forms[frame]["sentence"]["en"])


def _agreeing(cell: str, head: str, language: str) -> str:
    """Choose the alternative of `cell` that agrees with the concept `head`."""
    if "/" not in cell:
        return cell
    return cell.split("/")[int(_book().forms[head]["agreement"][language]) - 1]


@cache
def _phrase(concept: str, form: str, tail: bool, head: str, language: str) -> str:
    parts = _book().forms[concept]
    cell = (parts[form] if form in parts else next(iter(parts.values())))[language]
    if form == "bare":
        cell = _BARE.sub("", cell).lower()
    verb, _, particle = _agreeing(cell, head, language).partition(" + ")
    return particle if tail else verb


def _fill(template: str, scene: Scene, language: str) -> str:
    words = []
    for slot, form, tail, literal in _template(template):
        if slot:
            head = scene.get(_AGREES_WITH.get(slot, ""), "")
            words.append(_phrase(scene[slot], form, tail, head, language))
        else:
            words.append(_agreeing(literal, scene.get("who", ""), language))
    # A verb without a second part leaves two spaces, or one before the full stop.
    return " ".join("".join(words).split()).replace(" .", ".")


def _sentence(frame: str, scene: Scene, language: str) -> str:
    text = _fill(_book().forms[frame]["sentence"][language], scene, language)
    return text[0].upper() + text[1:]


def _passage(frames: Iterable[str], scene: Scene, language: str) -> str:
    return " ".join(_sentence(frame, scene, language) for frame in frames)


# --- scenes and their partition -------------------------------------------------------------------


@cache
def _part_of_pair(first: str, second: str) -> str:
    """Return ``train``, ``validation``, ``test``, or nothing for a pair that is free."""
    tables = _book().table_of
    if frozenset((tables[first], tables[second])) not in _KEY_PAIRS:
        return ""
    name = " ".join(sorted((first, second)))
    place = int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big") % 20
    return "test" if place < 4 else "validation" if place == 4 else "train"


def _part(concepts: Iterable[str]) -> str:
    """Return the part that a set of concepts belongs to: that of its most reserved pair."""
    parts = {_part_of_pair(a, b) for a, b in combinations(sorted(set(concepts)), 2)}
    return next((part for part in ("test", "validation", "train") if part in parts), "")


@cache
def _weights(table: str, skewed: bool) -> tuple[float, ...]:
    """Cumulative weights of a table's concepts; skewed: falling like 1/rank in a fixed order."""
    concepts = _book().tables[table]
    if table == "verbs":
        # One can buy anything but write only letters and books. Without this, hardly any would be
        # written; with the full reciprocal, hardly any bought.
        uses = Counter(verb for verbs in _book().verbs.values() for verb in verbs)
        return tuple(accumulate(uses[verb] ** -0.5 for verb in concepts))
    ranks = list(range(len(concepts)))
    random.Random(f"ranks {table}").shuffle(ranks)
    return tuple(accumulate(1 / (rank + 1) if skewed else 1.0 for rank in ranks))


def _pick(table: str, draw: random.Random, skewed: bool) -> str:
    weights = _weights(table, skewed)
    return _book().tables[table][bisect(weights, draw.random() * weights[-1])]


def _suits(slot: str, concept: str, scene: Scene, frames: Iterable[str]) -> bool:
    """Say whether a concept makes sense in a scene: one cannot read a fish, nor count honey."""
    book = _book()
    if slot in ("other", "also"):
        if concept in scene.values():
            return False
        return slot == "other" or "verb" not in scene or scene["verb"] in book.verbs[concept]
    if slot == "what":
        return "exist" not in frames or "plural" in book.forms[concept]
    if slot == "verb":
        return concept in book.verbs[scene["what"]]
    if slot == "quality":
        return concept in book.qualities[scene["what"]]
    return True


def _possible(frames: Iterable[str], scene: Scene) -> bool:
    before: dict[str, str] = {}
    for slot in _SLOTS:
        if slot in scene:
            if not _suits(slot, scene[slot], before, frames):
                return False
            before[slot] = scene[slot]
    return True


def _draw_scene(
    frames: tuple[str, ...], draw: random.Random, *, skewed: bool, train: bool = False
) -> dict[str, str]:
    """Fill the slots of some frames; with `train`, all pairs of the scene are training pairs."""
    needed = {slot for frame in frames for slot in _frame_slots(frame)}
    scene: dict[str, str] = {}
    while len(scene) < len(needed):
        scene = {}
        for slot in _SLOTS:
            if slot not in needed:
                continue
            for _ in range(_TRIES):
                concept = _pick(_SLOTS[slot], draw, skewed)
                free = not train or all(
                    _part_of_pair(concept, other) in ("train", "") for other in scene.values()
                )
                if free and _suits(slot, concept, scene, frames):
                    scene[slot] = concept
                    break
            else:
                break  # nothing fits what was drawn before: begin anew
    return scene


def words(text: str) -> list[str]:
    """Cut a text of the phrasebook into lower-case words; French ``l'`` and ``d'`` are words."""
    return [word for word in re.split(r"[\s.,?]+|(?<=\b[ld]')", text.lower()) if word]
