"""The phrasebook: a small parallel collection in eight languages, for demonstrations and tests.

**This is a demonstration, not a benchmark.** Eight sentence frames and some 150 concepts, written
by hand for this project in English, Swahili, Somali, Tagalog, Marathi, Finnish, German and French,
combine into hundreds of thousands of parallel sentences. The languages are real: each has its own
word order, agreement and case forms, so that translations differ in order and length. The texts are
not: they say simple things about teachers, bread and markets, and no score on them says anything
about a language in general. What they do show, in minutes and without a download, is whether a
method learns from parallel sentences at all, and what fewer of them cost.

The tables lie in ``data/phrasebook``, one concept and grammatical form a line. ``=`` repeats the
concept's first line; ``a/b`` are alternatives that agree with another word; ``a + b`` is a verb
whose second part stands at the end of a German clause.

Nothing is tested that was trained on. Every pair of concepts that can make a sentence particular
(object and person, object and place, object and quality, two objects, person and place) belongs to
one of three parts, fixed for ever by a hash of the two names. Training sentences and passages hold
pairs of the first part only; every validation sentence holds one of the second; every sentence of a
test document and every test query holds one of the third. So every *word* may be seen in training,
and no training text is relevant to a test query.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from importlib.resources import files
from itertools import accumulate, combinations
from pathlib import Path

from optical.files import writable_folder, write_text

LOW_RESOURCE = ("sw", "so", "tl", "mr")
HIGH_RESOURCE = ("fi", "de", "fr")
LANGUAGES = LOW_RESOURCE + HIGH_RESOURCE
NAMES = {
    "en": "English", "sw": "Swahili", "so": "Somali", "tl": "Tagalog", "mr": "Marathi",
    "fi": "Finnish", "de": "German", "fr": "French",
}  # fmt: skip

# Parallel sentences that a language has. Words follow a long-tailed distribution, so that a few
# hundred sentences miss part of the vocabulary and show much of the rest once or twice.
BITEXT_PAIRS = {"sw": 600, "so": 300, "tl": 500, "mr": 400, "fi": 3000, "de": 3000, "fr": 3000}
# Share of the possible entries that the lexicon of a language holds.
LEXICON_SHARE = {"sw": 0.7, "so": 0.5, "tl": 0.7, "mr": 0.6, "fi": 0.95, "de": 0.95, "fr": 0.95}
# Plain text is easier to find than parallel text, also in low-resource languages.
SENTENCES = {"en": 4000, "sw": 2000, "so": 2000, "tl": 2000, "mr": 2000,
             "fi": 4000, "de": 4000, "fr": 4000}  # fmt: skip

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

# Sentences of a document or passage, all about one scene.
_PASSAGES = (
    ("act", "quality", "transfer"),
    ("act", "exist"),
    ("act", "stay", "quality"),
    ("stay", "want", "quality"),
    ("exist", "want", "together"),
    ("both", "stay"),
    ("quality", "together", "exist"),
    ("transfer", "act"),
)
# What a searcher writes: a few words, or a question. `bare` is a phrase without its preposition.
_QUERIES = (
    "{who:bare} {what:bare}",
    "{what:bare} {where:bare}",
    "{who:bare} {what:bare} {where:bare}",
    "{who:bare} {verb:infinitive} {what:bare}",
    "{verb:infinitive} {what:bare} {where:bare}",
    "{quality} {what:bare} {where:bare}",
    "{who:bare} {quality} {what:bare}",
    "{who:bare} {what:bare} {time:bare}",
    "{who:bare} {other:bare} {what:bare}",
    "{who:bare} {what:bare} {where:bare} {time:bare}",
    "who {verb} the {what} {where}?",
    "what does the {who} {verb:infinitive} {where}?",
    "where does the {who} {verb:infinitive} the {what}?",
    "who {verb} the {what} {where} {time}?",
    "when does the {who} {verb:infinitive} the {what} {where}?",
)
_DOCUMENTS = 300
_TEST_QUERIES = 120
_PER_FORM = 9  # test queries of one form at most
_SCENE_FAMILY = 6  # documents that vary one scene, and so are near misses of each other
_MAX_RELEVANT = 4
_MIN_NEAR_MISSES = 3

_SLOT = re.compile(r"\{(\w+)(?::(\w+))?(\+)?\}|\[([^\]]*)\]")
_BARE = re.compile(r"^(?:(?:at|in|on|by|after) )?(?:the )?")
# Words that a dictionary entry leaves out.
_FUNCTION_WORDS = {
    "en": "the at in on by after",
    "sw": "", "so": "", "mr": "", "fi": "",
    "tl": "sa ng tuwing",
    "de": "der die das den dem auf an am im in nach",
    "fr": "le la au à dans sur en",
}  # fmt: skip

Scene = Mapping[str, str]  # slot -> concept
Qrels = dict[str, dict[str, int]]


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
    path = files("optical") / "data" / "phrasebook" / f"{table}.tsv"
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


def _language(language: str, *, english: bool = False) -> None:
    known = ("en", *LANGUAGES) if english else LANGUAGES
    if language not in known:
        raise ValueError(f"language: {language!r}, expected one of {', '.join(known)}")


def _distinct_sentences(
    part: str, languages: tuple[str, ...], count: int, draw: random.Random, *, skewed: bool
) -> Iterator[tuple[str, ...]]:
    """Yield `count` different sentences of a part, each in all `languages`, the frames in turn."""
    frames = _book().tables["frames"]
    seen: list[set[str]] = [set() for _ in languages]
    made = attempts = 0
    while made < count:
        attempts += 1
        if attempts > 200 * count + 10_000:
            raise ValueError(f"{count} sentences wanted, the phrasebook has only about {made}")
        frame = frames[made % len(frames)]
        scene = _draw_scene((frame,), draw, skewed=skewed, train=part == "train")
        if part != "train" and _part(scene.values()) != part:
            continue
        texts = tuple(_sentence(frame, scene, language) for language in languages)
        if any(text in known for text, known in zip(texts, seen, strict=True)):
            continue
        for text, known in zip(texts, seen, strict=True):
            known.add(text)
        made += 1
        yield texts


# --- what a study needs ---------------------------------------------------------------------------


def bitext(language: str, *, pairs: int | None = None, seed: int = 0) -> list[tuple[str, str]]:
    """Return parallel sentences for training: (English, `language`).

    No sentence occurs twice; all frames take turns. Words are long-tailed: a short bitext misses
    part of the vocabulary. A longer bitext of the same seed begins with the shorter one.

    Args:
        language: one of :data:`LANGUAGES`.
        pairs: how many; by default 300 to 600 for low-resource languages and 3,000 for the others
            (:data:`BITEXT_PAIRS`).
        seed: chooses the sentences. No seed reaches a test combination.

    Raises:
        ValueError: an unknown language, or more pairs than the phrasebook has.

    Examples:
        >>> from optical import phrasebook
        >>> len(phrasebook.bitext("so"))
        300
    """
    _language(language)
    count = BITEXT_PAIRS[language] if pairs is None else pairs
    return list(_bitext(language, count, seed))


@lru_cache(maxsize=8)  # the lexicon asks for the same one again
def _bitext(language: str, count: int, seed: int) -> tuple[tuple[str, str], ...]:
    draw = random.Random(f"bitext {language} {seed}")
    made = _distinct_sentences("train", ("en", language), count, draw, skewed=True)
    return tuple((english, foreign) for english, foreign in made)


def validation_bitext(language: str, *, pairs: int = 100, seed: int = 0) -> list[tuple[str, str]]:
    """Return parallel sentences disjoint from every bitext and from the test collection."""
    _language(language)
    draw = random.Random(f"validation {language} {seed}")
    made = _distinct_sentences("validation", ("en", language), pairs, draw, skewed=False)
    return [(english, foreign) for english, foreign in made]


def sentences(language: str, *, count: int | None = None, seed: int = 0) -> list[str]:
    """Return different sentences of one language, for a tokenizer or a masked language model.

    They are drawn apart from the bitext and are not parallel to it; English (``"en"``) has them
    too. By default 2,000 for low-resource languages and 4,000 for the others (:data:`SENTENCES`).
    """
    _language(language, english=True)
    count = SENTENCES[language] if count is None else count
    draw = random.Random(f"sentences {language} {seed}")
    return [text for (text,) in _distinct_sentences("train", (language,), count, draw, skewed=True)]


def english(*, pairs: int = 4000, seed: int = 0) -> list[tuple[str, str]]:
    """Return (query, relevant passage) pairs in English, to train the teacher.

    Passages are two or three sentences about one scene; queries are a few words or a question about
    it, in the forms of the test queries. No query and no passage occurs twice, and every pair of
    concepts in them is of the training part. A passage is relevant to its query for certain; some
    other passages may by chance be so too.
    """
    draw = random.Random(f"english {seed}")
    seen: set[str] = set()
    made: list[tuple[str, str]] = []
    attempts = 0
    while len(made) < pairs:
        attempts += 1
        if attempts > 200 * pairs + 10_000:
            raise ValueError(f"{pairs} pairs wanted, the phrasebook has only about {len(made)}")
        frames = _PASSAGES[attempts % len(_PASSAGES)]
        scene = _draw_scene(frames, draw, skewed=False, train=True)
        form = draw.choice([form for form in _QUERIES if scene.keys() >= set(_slots(form))])
        query, passage = _fill(form, scene, "en"), _passage(frames, scene, "en")
        if query not in seen and passage not in seen:
            seen |= {query, passage}
            made.append((query, passage))
    return made


@dataclass(frozen=True)
class _Test:
    documents: dict[str, tuple[tuple[str, ...], dict[str, str]]]  # id -> frames, scene
    queries: dict[str, tuple[str, dict[str, str]]]  # id -> form, slots that it asks about
    qrels: Qrels


@cache
def _test() -> _Test:
    draw = random.Random("test collection")
    documents: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
    known: set[frozenset[str]] = set()
    while len(documents) < _DOCUMENTS:
        frames = _PASSAGES[(len(documents) // _SCENE_FAMILY) % len(_PASSAGES)]
        base = _draw_scene(frames, draw, skewed=False)
        if not _is_test(frames, base):
            continue
        family = [base]
        for _ in range(400):
            if len(family) == _SCENE_FAMILY:
                break
            # One or two things change, so that a family holds near misses of each other, and often
            # a second document relevant to a query that does not ask about what changed.
            near = dict(draw.choice(family))
            for slot in draw.sample(sorted(near), draw.choice((1, 1, 2))):
                near[slot] = _pick(_SLOTS[slot], draw, False)
            if _possible(frames, near) and near not in family and _is_test(frames, near):
                family.append(near)
        fresh = {frozenset(scene.values()) for scene in family} - known
        if len(family) < _SCENE_FAMILY or len(fresh) < _SCENE_FAMILY:
            continue
        known |= fresh
        for scene in family:
            documents[f"d{len(documents) + 1:03d}"] = (frames, scene)

    contents = {docid: frozenset(scene.values()) for docid, (_, scene) in documents.items()}
    candidates = [
        (form, {slot: scene[slot] for slot in _slots(form)})
        for _, scene in documents.values()
        for form in _QUERIES
        if scene.keys() >= set(_slots(form))
    ]
    draw.shuffle(candidates)
    queries: dict[str, tuple[str, dict[str, str]]] = {}
    qrels: Qrels = {}
    asked: set[frozenset[str]] = set()
    used: Counter[str] = Counter()
    for form, slots in candidates:
        wanted = frozenset(slots.values())
        if wanted in asked or used[form] == _PER_FORM or _part(wanted) != "test":
            continue
        missing = {docid: wanted - content for docid, content in contents.items()}
        relevant = sorted(docid for docid, lacking in missing.items() if not lacking)
        near_misses = [lacking for lacking in missing.values() if len(lacking) == 1]
        # Two words at least must matter: leave either out, and wrong documents fit.
        if (
            len(relevant) <= _MAX_RELEVANT
            and len(near_misses) >= _MIN_NEAR_MISSES
            and len(set(near_misses)) >= 2
        ):
            qid = f"q{len(queries) + 1:03d}"
            queries[qid] = (form, slots)
            qrels[qid] = dict.fromkeys(relevant, 1)
            asked.add(wanted)
            used[form] += 1
        if len(queries) == _TEST_QUERIES:
            break
    return _Test(documents, queries, qrels)


def _is_test(frames: Iterable[str], scene: Scene) -> bool:
    return all(_part(scene[slot] for slot in _frame_slots(frame)) == "test" for frame in frames)


def collection(language: str) -> tuple[dict[str, str], dict[str, str], Qrels]:
    """Return the test collection: English queries, documents in `language`, judgements.

    Ids are the same in every language; ``"en"`` gives the English documents and so the ceiling. A
    document is relevant (grade 1) if and only if its scene holds everything that the query asks
    about, in whichever of its sentences. Each query has one to four relevant documents and at least
    three near misses that lack one thing, and not all of them the same.

    Returns:
        Queries (id -> text), documents (id -> text), judgements (query -> document -> 1).

    Raises:
        ValueError: an unknown language.

    Examples:
        >>> from optical import phrasebook
        >>> queries, documents, qrels = phrasebook.collection("sw")
        >>> len(queries), len(documents)
        (120, 300)
    """
    _language(language, english=True)
    test = _test()
    return (
        {qid: _fill(form, slots, "en") for qid, (form, slots) in test.queries.items()},
        {
            docid: _passage(frames, scene, language)
            for docid, (frames, scene) in test.documents.items()
        },
        {qid: dict(grades) for qid, grades in test.qrels.items()},
    )


def lexicon(language: str) -> dict[str, list[str]]:
    """Return a dictionary for code switching: an English word -> its translations, in lower case.

    Partial, as dictionaries are: only where one word stands for one word (articles, case markers
    and prepositions aside), only words that the language's bitext shows, and of these a fixed
    share: 95 % for high-resource languages, 50 to 70 % for low-resource ones
    (:data:`LEXICON_SHARE`). Forms are those of the tables: a place carries its locative ending.
    """
    _language(language)
    known = {word for _, foreign in bitext(language) for word in words(foreign)}
    entries: dict[str, list[str]] = {}
    for concept, parts in _book().forms.items():
        if _book().table_of[concept] == "frames":
            continue
        for part, cells in parts.items():
            if part in ("agreement", "to", "with", "given"):
                continue
            source = _single_word(cells["en"], "en")
            if not source or not _listed(source, language):
                continue
            for alternative in cells[language].split("/"):
                target = _single_word(alternative, language)
                translations = entries.setdefault(source, [])
                if target and target in known and target not in translations:
                    translations.append(target)
    return {source: targets for source, targets in sorted(entries.items()) if targets}


def words(text: str) -> list[str]:
    """Cut a text of the phrasebook into lower-case words; French ``l'`` and ``d'`` are words."""
    return [word for word in re.split(r"[\s.,?]+|(?<=\b[ld]')", text.lower()) if word]


def _single_word(phrase: str, language: str) -> str:
    function_words = (*_FUNCTION_WORDS[language].split(), "l'")
    content = [word for word in words(phrase) if word not in function_words]
    return content[0] if len(content) == 1 else ""


def _listed(word: str, language: str) -> bool:
    place = int.from_bytes(blake2b(f"{language} {word}".encode(), digest_size=4).digest(), "big")
    return place < LEXICON_SHARE[language] * 2**32


def write(folder: str | Path) -> list[Path]:
    """Write everything as ordinary files, the forms that the commands read; return their paths.

    ``queries.tsv`` (id TAB text), ``qrels.txt`` (TREC), ``documents/LANGUAGE.jsonl``,
    ``bitext/en-LANGUAGE.tsv``, ``validation/en-LANGUAGE.tsv`` and ``lexicon/en-LANGUAGE.tsv``
    (English TAB foreign), ``text/LANGUAGE.txt`` (a sentence a line) and ``teacher.tsv`` (query TAB
    passage).

    Raises:
        OSError: the folder cannot be written.
    """
    folder = writable_folder(folder)
    queries, _, qrels = collection("en")
    contents = {
        "queries.tsv": _table(queries.items()),
        "qrels.txt": "".join(
            f"{qid} 0 {docid} {grade}\n"
            for qid, grades in qrels.items()
            for docid, grade in grades.items()
        ),
        "teacher.tsv": _table(english()),
    }
    for language in ("en", *LANGUAGES):
        _, documents, _ = collection(language)
        contents[f"documents/{language}.jsonl"] = "".join(
            json.dumps({"id": docid, "text": text}, ensure_ascii=False) + "\n"
            for docid, text in documents.items()
        )
        contents[f"text/{language}.txt"] = "".join(f"{text}\n" for text in sentences(language))
    for language in LANGUAGES:
        contents[f"bitext/en-{language}.tsv"] = _table(bitext(language))
        contents[f"validation/en-{language}.tsv"] = _table(validation_bitext(language))
        contents[f"lexicon/en-{language}.tsv"] = _table(
            (word, translation)
            for word, translations in lexicon(language).items()
            for translation in translations
        )
    paths = []
    for name, text in contents.items():
        path = folder / name
        writable_folder(path.parent)
        write_text(path, text)
        paths.append(path)
    return paths


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{first}\t{second}\n" for first, second in rows)
