"""The phrasebook: a synthetic parallel corpus in eight languages, for demonstrations and tests.

**This is a demonstration, not a benchmark.** Eight sentence frames and about 150 concepts, written
by hand for this project in English, Swahili, Somali, Tagalog, Marathi, Finnish, German and French,
generate hundreds of thousands of parallel sentences. Each language has its own word order,
agreement and case forms, so translations differ in word order and length. The sentences are simple
statements about teachers, bread and markets, and scores on them say nothing about retrieval in a
language in general. They show within minutes, without a download, whether a method learns from
bitext at all, and how it degrades with less bitext.

The tables in ``phrasebook/tables`` have one line per concept and grammatical form. ``=`` repeats
the concept's first line; ``a/b`` are alternatives that agree with another word; ``a + b`` is a verb
whose second part stands at the end of a German clause.

Training and test data are disjoint by construction. Every pair of concepts that makes a sentence
specific (object and person, object and place, object and quality, two objects, person and place)
belongs to the training, validation or test partition, determined by a hash of the two names.
Training sentences and passages contain training pairs only; every validation sentence contains a
validation pair; every sentence of a test document and every test query contains a test pair. Every
*word* may therefore occur in training, but no training text is relevant to a test query.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from pathlib import Path

from optical.io.files import writable_folder, write_text
from optical.phrasebook.grammar import (
    LANGUAGES,
    SLOT_TABLES,
    Scene,
    draw_concept,
    draw_scene,
    fill_template,
    frame_slots,
    is_plausible_scene,
    load_tables,
    partition_of,
    passage,
    sentence,
    split_words,
    template_slots,
)

# Sentence pairs of each language. Word frequencies are long-tailed, so a few hundred sentences lack
# part of the vocabulary and show much of the rest once or twice.
BITEXT_PAIRS = {"sw": 600, "so": 300, "tl": 500, "mr": 400, "fi": 3000, "de": 3000, "fr": 3000}
# Share of the possible entries that a language's lexicon contains.
LEXICON_SHARE = {"sw": 0.7, "so": 0.5, "tl": 0.7, "mr": 0.6, "fi": 0.95, "de": 0.95, "fr": 0.95}
# Monolingual sentences; they are easier to obtain than bitext, even in low-resource languages.
SENTENCES = {"en": 4000, "sw": 2000, "so": 2000, "tl": 2000, "mr": 2000,
             "fi": 4000, "de": 4000, "fr": 4000}  # fmt: skip

# Frames of a document or passage, whose sentences describe one scene.
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
# Templates of queries: keywords or questions. `bare` is a phrase without its preposition.
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
_MAX_PER_FORM = 9  # test queries of one template
_SCENE_FAMILY = 6  # documents that vary one scene and so are near misses of one another
_MAX_RELEVANT = 4
_MIN_NEAR_MISSES = 3
# Function words that lexicon entries omit.
_FUNCTION_WORDS = {
    "en": "the at in on by after",
    "sw": "", "so": "", "mr": "", "fi": "",
    "tl": "sa ng tuwing",
    "de": "der die das den dem auf an am im in nach",
    "fr": "le la au à dans sur en",
}  # fmt: skip
Qrels = dict[str, dict[str, int]]


def _check_language(language: str, *, english: bool = False) -> None:
    languages = ("en", *LANGUAGES) if english else LANGUAGES
    if language not in languages:
        raise ValueError(f"language: {language!r}, expected one of {', '.join(languages)}")


def _distinct_sentences(
    partition: str, languages: tuple[str, ...], count: int, draw: random.Random, *, skewed: bool
) -> Iterator[tuple[str, ...]]:
    """Yield `count` distinct sentences of a partition in all `languages`, frames alternating."""
    frames = load_tables().tables["frames"]
    seen: list[set[str]] = [set() for _ in languages]
    yielded = attempts = 0
    while yielded < count:
        attempts += 1
        if attempts > 200 * count + 10_000:
            raise ValueError(f"{count} sentences wanted, the phrasebook has only about {yielded}")
        frame = frames[yielded % len(frames)]
        scene = draw_scene((frame,), draw, skewed=skewed, train=partition == "train")
        if partition != "train" and partition_of(scene.values()) != partition:
            continue
        texts = tuple(sentence(frame, scene, language) for language in languages)
        if any(text in earlier for text, earlier in zip(texts, seen, strict=True)):
            continue
        for text, earlier in zip(texts, seen, strict=True):
            earlier.add(text)
        yielded += 1
        yield texts


# --- the parts of the corpus ----------------------------------------------------------------------


def bitext(language: str, *, pairs: int | None = None, seed: int = 0) -> list[tuple[str, str]]:
    """Return sentence pairs for training: (English, `language`).

    Sentences are distinct and the frames alternate. Word frequencies are long-tailed, so a short
    bitext lacks part of the vocabulary. A longer bitext with the same seed starts with the shorter
    one.

    Args:
        language: one of :data:`optical.phrasebook.grammar.LANGUAGES`.
        pairs: number of pairs; the default is 300 to 600 for low-resource languages and 3,000 for
            the others (:data:`BITEXT_PAIRS`).
        seed: selects the sentences; none contains a test pair of concepts.

    Raises:
        ValueError: an unknown language, or more pairs than the phrasebook has.

    Examples:
        >>> from optical import phrasebook
        >>> len(phrasebook.bitext("so"))
        300
    """
    _check_language(language)
    count = BITEXT_PAIRS[language] if pairs is None else pairs
    return list(_bitext(language, count, seed))


@lru_cache(maxsize=8)  # the lexicon reads the same bitext
def _bitext(language: str, count: int, seed: int) -> tuple[tuple[str, str], ...]:
    draw = random.Random(f"bitext {language} {seed}")
    drawn = _distinct_sentences("train", ("en", language), count, draw, skewed=True)
    return tuple((english, foreign) for english, foreign in drawn)


def validation_bitext(language: str, *, pairs: int = 100, seed: int = 0) -> list[tuple[str, str]]:
    """Return sentence pairs disjoint from every training bitext and from the test collection."""
    _check_language(language)
    draw = random.Random(f"validation {language} {seed}")
    drawn = _distinct_sentences("validation", ("en", language), pairs, draw, skewed=False)
    return [(english, foreign) for english, foreign in drawn]


def sentences(language: str, *, count: int | None = None, seed: int = 0) -> list[str]:
    """Return distinct monolingual sentences, for a tokenizer or a masked language model.

    They are drawn independently of the bitext. English (``"en"``) is included. The default count is
    2,000 for low-resource languages and 4,000 for the others (:data:`SENTENCES`).
    """
    _check_language(language, english=True)
    count = SENTENCES[language] if count is None else count
    draw = random.Random(f"sentences {language} {seed}")
    return [text for (text,) in _distinct_sentences("train", (language,), count, draw, skewed=True)]


def training_pairs(*, pairs: int = 4000, seed: int = 0) -> list[tuple[str, str]]:
    """Return (query, relevant passage) pairs in English, to train the teacher.

    Passages are two or three sentences about one scene. Queries are keywords or a question about
    it, from the templates of the test queries. Queries and passages are distinct, and every pair of
    concepts in them belongs to the training partition. Each passage is relevant to its query; other
    passages may be relevant by chance.
    """
    draw = random.Random(f"english {seed}")
    seen: set[str] = set()
    training: list[tuple[str, str]] = []
    attempts = 0
    while len(training) < pairs:
        attempts += 1
        if attempts > 200 * pairs + 10_000:
            raise ValueError(f"{pairs} pairs wanted, the phrasebook has only about {len(training)}")
        frames = _PASSAGES[attempts % len(_PASSAGES)]
        scene = draw_scene(frames, draw, skewed=False, train=True)
        form = draw.choice([form for form in _QUERIES if scene.keys() >= set(template_slots(form))])
        query, text = fill_template(form, scene, "en"), passage(frames, scene, "en")
        if query not in seen and text not in seen:
            seen |= {query, text}
            training.append((query, text))
    return training


@dataclass(frozen=True)
class _TestCollection:
    documents: dict[str, tuple[tuple[str, ...], dict[str, str]]]  # id -> frames, scene
    queries: dict[str, tuple[str, dict[str, str]]]  # id -> template, slots that it asks about
    qrels: Qrels


@cache
def _test_collection() -> _TestCollection:
    draw = random.Random("test collection")
    documents = _test_documents(draw)
    contents = {docid: frozenset(scene.values()) for docid, (_, scene) in documents.items()}
    candidates = [
        (form, {slot: scene[slot] for slot in template_slots(form)})
        for _, scene in documents.values()
        for form in _QUERIES
        if scene.keys() >= set(template_slots(form))
    ]
    draw.shuffle(candidates)
    queries: dict[str, tuple[str, dict[str, str]]] = {}
    qrels: Qrels = {}
    asked: set[frozenset[str]] = set()
    per_form: Counter[str] = Counter()
    for form, slots in candidates:
        concepts = frozenset(slots.values())
        if concepts in asked or per_form[form] == _MAX_PER_FORM or partition_of(concepts) != "test":
            continue
        relevant = _relevant_documents(concepts, contents)
        if relevant:
            qid = f"q{len(queries) + 1:03d}"
            queries[qid] = (form, slots)
            qrels[qid] = dict.fromkeys(relevant, 1)
            asked.add(concepts)
            per_form[form] += 1
        if len(queries) == _TEST_QUERIES:
            break
    return _TestCollection(documents, queries, qrels)


def _test_documents(
    draw: random.Random,
) -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """Draw documents in families that vary one scene; returns id -> frames, scene."""
    documents: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
    seen: set[frozenset[str]] = set()
    while len(documents) < _DOCUMENTS:
        frames = _PASSAGES[(len(documents) // _SCENE_FAMILY) % len(_PASSAGES)]
        base = draw_scene(frames, draw, skewed=False)
        if not _is_test(frames, base):
            continue
        family = [base]
        for _ in range(400):
            if len(family) == _SCENE_FAMILY:
                break
            # One or two slots change, so that a family contains near misses and often a second
            # document relevant to a query about the unchanged slots.
            variant = dict(draw.choice(family))
            for slot in draw.sample(sorted(variant), draw.choice((1, 1, 2))):
                variant[slot] = draw_concept(SLOT_TABLES[slot], draw, False)
            if (
                is_plausible_scene(frames, variant)
                and variant not in family
                and _is_test(frames, variant)
            ):
                family.append(variant)
        fresh = {frozenset(scene.values()) for scene in family} - seen
        if len(family) < _SCENE_FAMILY or len(fresh) < _SCENE_FAMILY:
            continue
        seen |= fresh
        for scene in family:
            documents[f"d{len(documents) + 1:03d}"] = (frames, scene)
    return documents


def _relevant_documents(concepts: frozenset[str], contents: dict[str, frozenset[str]]) -> list[str]:
    """Return the documents that contain all concepts of a query; empty if the query is unsuitable.

    A suitable query has few relevant documents and enough near misses, which must not all lack the
    same concept: otherwise ignoring one word of the query would not retrieve wrong documents.
    """
    missing = {docid: concepts - content for docid, content in contents.items()}
    relevant = sorted(docid for docid, lacking in missing.items() if not lacking)
    near_misses = [lacking for lacking in missing.values() if len(lacking) == 1]
    if (
        len(relevant) <= _MAX_RELEVANT
        and len(near_misses) >= _MIN_NEAR_MISSES
        and len(set(near_misses)) >= 2
    ):
        return relevant
    return []


def _is_test(frames: Iterable[str], scene: Scene) -> bool:
    """Return whether every sentence of a document contains a test pair of concepts."""
    return all(
        partition_of(scene[slot] for slot in frame_slots(frame)) == "test" for frame in frames
    )


def collection(language: str) -> tuple[dict[str, str], dict[str, str], Qrels]:
    """Return the test collection: English queries, documents in `language`, judgements.

    Ids are the same in every language; ``"en"`` gives the English documents, the upper bound. A
    document is relevant (grade 1) if and only if its scene contains every concept of the query, in
    any of its sentences. Each query has one to four relevant documents and at least three near
    misses that lack one concept, and these do not all lack the same one.

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
    _check_language(language, english=True)
    test = _test_collection()
    return (
        {qid: fill_template(form, slots, "en") for qid, (form, slots) in test.queries.items()},
        {
            docid: passage(frames, scene, language)
            for docid, (frames, scene) in test.documents.items()
        },
        {qid: dict(grades) for qid, grades in test.qrels.items()},
    )


def lexicon(language: str) -> dict[str, list[str]]:
    """Return a partial lexicon for code switching: lower-case English word -> translations.

    Entries are pairs of single words (without articles, case markers and prepositions) that occur
    in the language's bitext, reduced to a fixed share: 95 % for high-resource languages, 50 to 70 %
    for low-resource ones (:data:`LEXICON_SHARE`). Words have the forms of the tables; a place, for
    example, has its locative ending.

    Raises:
        ValueError: an unknown language.
    """
    _check_language(language)
    bitext_words = {word for _, foreign in bitext(language) for word in split_words(foreign)}
    tables = load_tables()
    entries: dict[str, list[str]] = {}
    for concept, forms in tables.forms.items():
        if tables.table_of[concept] == "frames":
            continue
        for form, cells in forms.items():
            if form in ("agreement", "to", "with", "given"):
                continue
            source = _single_word(cells["en"], "en")
            if not source or not _is_listed(source, language):
                continue
            for alternative in cells[language].split("/"):
                target = _single_word(alternative, language)
                translations = entries.setdefault(source, [])
                if target and target in bitext_words and target not in translations:
                    translations.append(target)
    return {source: targets for source, targets in sorted(entries.items()) if targets}


def _single_word(phrase: str, language: str) -> str:
    """Return the only content word of a phrase, or "" if there is not exactly one."""
    function_words = (*_FUNCTION_WORDS[language].split(), "l'")
    content = [word for word in split_words(phrase) if word not in function_words]
    return content[0] if len(content) == 1 else ""


def _is_listed(word: str, language: str) -> bool:
    digest = blake2b(f"{language} {word}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < LEXICON_SHARE[language] * 2**32


def write(folder: str | Path) -> list[Path]:
    """Write the corpus as files that the commands read, and return their paths.

    ``queries.tsv`` (id TAB text), ``qrels.txt`` (TREC), ``documents/LANGUAGE.jsonl``,
    ``bitext/en-LANGUAGE.tsv``, ``validation/en-LANGUAGE.tsv`` and ``lexicon/en-LANGUAGE.tsv``
    (English TAB foreign), ``text/LANGUAGE.txt`` (one sentence per line) and ``teacher.tsv`` (query
    TAB passage).

    Raises:
        OSError: the folder cannot be written.
    """
    folder = writable_folder(folder)
    queries, _, qrels = collection("en")
    contents = {
        "queries.tsv": _tsv(queries.items()),
        "qrels.txt": "".join(
            f"{qid} 0 {docid} {grade}\n"
            for qid, grades in qrels.items()
            for docid, grade in grades.items()
        ),
        "teacher.tsv": _tsv(training_pairs()),
    }
    for language in ("en", *LANGUAGES):
        _, documents, _ = collection(language)
        contents[f"documents/{language}.jsonl"] = "".join(
            json.dumps({"id": docid, "text": text}, ensure_ascii=False) + "\n"
            for docid, text in documents.items()
        )
        contents[f"text/{language}.txt"] = "".join(f"{text}\n" for text in sentences(language))
    for language in LANGUAGES:
        contents[f"bitext/en-{language}.tsv"] = _tsv(bitext(language))
        contents[f"validation/en-{language}.tsv"] = _tsv(validation_bitext(language))
        contents[f"lexicon/en-{language}.tsv"] = _tsv(
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


def _tsv(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{first}\t{second}\n" for first, second in rows)
