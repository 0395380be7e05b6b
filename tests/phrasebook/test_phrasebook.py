"""The phrasebook: consistent tables, exact judgements, disjoint training and test data."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import median

import pytest

from optical.phrasebook import corpus, grammar

ALL = ("en", *grammar.LANGUAGES)


@pytest.fixture(scope="module")
def bitexts() -> dict[str, list[tuple[str, str]]]:
    return {language: corpus.bitext(language) for language in grammar.LANGUAGES}


@pytest.fixture(scope="module")
def teacher() -> list[tuple[str, str]]:
    return corpus.training_pairs()


@pytest.fixture(scope="module")
def monolingual() -> dict[str, list[str]]:
    return {language: corpus.sentences(language) for language in ALL}


@pytest.fixture(scope="module")
def lexicons() -> dict[str, dict[str, list[str]]]:
    return {language: corpus.lexicon(language) for language in grammar.LANGUAGES}


@pytest.fixture(scope="module")
def collections() -> dict[str, tuple[dict[str, str], dict[str, str], corpus.Qrels]]:
    return {language: corpus.collection(language) for language in ALL}


@cache
def phrases() -> tuple[re.Pattern[str], dict[str, str]]:
    tables = grammar.load_tables()
    known: dict[str, str] = {}
    for concept, parts in tables.forms.items():
        if tables.table_of[concept] != "frames":
            for part in (*(part for part in parts if part != "agreement"), "bare"):
                phrase = grammar.phrase(concept, part, False, "", "en").lower()
                assert known.setdefault(phrase, concept) == concept, phrase
    longest_first = sorted(known, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(longest_first)})\b"), known


def concepts_of(text: str) -> set[str]:
    """Return the concepts in an English text, identified by their phrases."""
    pattern, known = phrases()
    return {known[phrase] for phrase in pattern.findall(text.lower())}


def test_tables_are_complete_and_have_no_stray_spaces():
    folder = Path(corpus.__file__).parent / "tables"
    paths = sorted(folder.glob("*.tsv"))
    assert len(paths) == 11
    for table in paths:
        header, *lines = table.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=2):
            cells = line.split("\t")
            assert len(cells) == len(header.split("\t")), f"{table.name}:{number}"
            assert all(cell and cell == " ".join(cell.split()) for cell in cells), (
                f"{table.name}:{number}"
            )
            assert unicodedata.is_normalized("NFC", line), f"{table.name}:{number}"


def test_each_concept_is_in_one_table_and_uses_name_known_concepts():
    tables = grammar.load_tables()
    assert sum(map(len, tables.tables.values())) == len(tables.forms)
    assert set(tables.verbs) == set(tables.qualities) == set(tables.tables["objects"])
    assert {verb for verbs in tables.verbs.values() for verb in verbs} == set(
        tables.tables["verbs"]
    )
    assert {q for qs in tables.qualities.values() for q in qs} == set(tables.tables["qualities"])


@pytest.mark.parametrize("language", ALL)
def test_no_two_concepts_of_a_table_share_a_translation(language):
    # Otherwise a document could match a query in English and not in the other language.
    tables = grammar.load_tables()
    for table, concepts in tables.tables.items():
        cells = Counter(
            next(iter(tables.forms[concept].values()))[language] for concept in concepts
        )
        assert max(cells.values()) == 1, (table, cells.most_common(1))


@pytest.mark.parametrize("language", ALL)
def test_every_sentence_is_complete(language, monolingual):
    for sentence in monolingual[language]:
        assert sentence.endswith(".") and sentence == " ".join(sentence.split())
        assert not set(sentence) & set("{}[]/+=:_|"), sentence
        assert sentence[0] == sentence[0].upper()


@pytest.mark.parametrize("language", ALL)
def test_texts_use_the_script_of_their_language(language, bitexts, collections, monolingual):
    texts = monolingual[language] + list(collections[language][1].values())
    if language != "en":
        texts += [foreign for _, foreign in bitexts[language]]
    script = "DEVANAGARI" if language == "mr" else "LATIN"
    for letter in set("".join(texts)) - set(" .,'-"):
        assert unicodedata.name(letter).startswith(script), (language, letter)


def test_the_corpus_is_equal_in_every_process():
    program = (
        "import hashlib, json; from optical import phrasebook as p;"
        "print(hashlib.sha256(json.dumps([p.collection('so'), p.bitext('so'), p.lexicon('so'),"
        "p.training_pairs(pairs=50), p.validation_bitext('so'), p.sentences('so', count=50)])"
        ".encode()).hexdigest())"
    )
    parts = [
        corpus.collection("so"), corpus.bitext("so"), corpus.lexicon("so"),
        corpus.training_pairs(pairs=50), corpus.validation_bitext("so"),
        corpus.sentences("so", count=50),
    ]  # fmt: skip
    expected = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    digest = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "123"},
        cwd=Path(corpus.__file__).parents[2],
    ).stdout.strip()  # fmt: skip
    assert digest == expected


def test_bitext_depends_on_its_seed_and_extends_shorter_bitext():
    assert corpus.bitext("fi", pairs=50) == corpus.bitext("fi", pairs=80)[:50]
    assert corpus.bitext("fi", pairs=50) != corpus.bitext("fi", pairs=50, seed=1)
    assert corpus.bitext("fi", pairs=0) == []


def test_default_sizes(bitexts, collections, teacher, monolingual):
    sizes = {language: len(pairs) for language, pairs in bitexts.items()}
    assert sizes == corpus.BITEXT_PAIRS
    low = [sizes[language] for language in grammar.LOW_RESOURCE]
    high = [sizes[language] for language in grammar.HIGH_RESOURCE]
    assert min(low) >= 300 and max(low) <= 600 and min(high) == 3000
    queries, documents, _ = collections["en"]
    assert (len(queries), len(documents)) == (120, 300)
    assert len(teacher) == 4000
    assert {language: len(texts) for language, texts in monolingual.items()} == corpus.SENTENCES
    assert len(corpus.validation_bitext("sw")) == 100


@pytest.mark.parametrize("language", grammar.LANGUAGES)
def test_every_frame_occurs_in_every_bitext(language, bitexts):
    openings = ("There are", " wants to ", " with the ", " and the ", " to the ", " is ")
    for mark in openings:
        assert sum(mark in english for english, _ in bitexts[language]) >= 30, mark


def test_low_resource_bitext_lacks_words_and_high_resource_bitext_does_not(bitexts):
    tables = grammar.load_tables()
    concepts = set(tables.forms) - set(tables.tables["frames"])
    rare = {}
    for language, pairs in bitexts.items():
        seen = Counter(concept for english, _ in pairs for concept in concepts_of(english))
        rare[language] = sum(seen[concept] < 3 for concept in concepts) / len(concepts)
    for language in grammar.LOW_RESOURCE:
        assert 0.02 < rare[language] < 0.5, rare
    for language in grammar.HIGH_RESOURCE:
        assert rare[language] == 0.0, rare


def test_texts_are_distinct(bitexts, collections, teacher, monolingual):
    for pairs in bitexts.values():
        assert len({english for english, _ in pairs}) == len(pairs)
        assert len({foreign for _, foreign in pairs}) == len(pairs)
    for queries, documents, _ in collections.values():
        assert len(set(queries.values())) == len(queries)
        assert len(set(documents.values())) == len(documents)
    assert all(len(set(texts)) == len(texts) for texts in monolingual.values())
    assert len({query for query, _ in teacher}) == len({text for _, text in teacher}) == 4000


def test_ids_and_judgements_are_the_same_in_every_language(collections):
    queries, documents, qrels = collections["en"]
    for language in grammar.LANGUAGES:
        others = collections[language]
        assert others[0] == queries and list(others[1]) == list(documents) and others[2] == qrels


def test_relevance_is_exact(collections):
    """Judge all pairs again from the English text."""
    queries, documents, qrels = collections["en"]
    contents = {docid: concepts_of(text) for docid, text in documents.items()}
    for qid, query in queries.items():
        wanted = concepts_of(query)
        assert 2 <= len(wanted) <= 4, query
        relevant = {docid for docid, content in contents.items() if wanted <= content}
        assert relevant == set(qrels[qid]), query
        assert set(qrels[qid].values()) == {1}
        assert 1 <= len(relevant) <= 4
        near = sum(len(wanted - content) == 1 for content in contents.values())
        assert near >= 3, query


def test_every_query_needs_at_least_two_of_its_words(collections):
    # A word is needed if further documents match the query without it.
    queries, documents, qrels = collections["en"]
    contents = {docid: concepts_of(text) for docid, text in documents.items()}
    for qid, query in queries.items():
        wanted = concepts_of(query)
        needed = [
            word
            for word in wanted
            if any(wanted - {word} <= contents[docid] for docid in contents.keys() - qrels[qid])
        ]
        assert len(needed) >= 2, query


def test_training_and_test_texts_are_disjoint(bitexts, collections, teacher, monolingual):
    queries, documents, _ = collections["en"]
    wanted = [concepts_of(query) for query in queries.values()]
    tested = {sentence for text in documents.values() for sentence in cut(text)}
    tested_combinations = {frozenset(concepts_of(sentence)) for sentence in tested}

    training = {text for pair in teacher for text in pair} | set(monolingual["en"])
    for pairs in (*bitexts.values(), corpus.bitext("so", seed=1)):
        training |= {english for english, _ in pairs}
    validation = {
        english
        for language in grammar.LANGUAGES
        for english, _ in corpus.validation_bitext(language)
    }
    assert not training & validation
    for text in training | validation:
        assert not tested & set(cut(text)), text
        content = concepts_of(text)
        assert content not in tested_combinations, text
        assert not any(query <= content for query in wanted), text


def cut(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"\.\s*", text) if sentence]


def test_training_and_test_pairs_of_concepts_are_disjoint(bitexts, collections):
    def keys(text: str) -> set[tuple[str, str]]:
        pairs = combinations(sorted(concepts_of(text)), 2)
        return {pair for pair in pairs if grammar.pair_partition(*pair)}

    trained = {key for pairs in bitexts.values() for english, _ in pairs for key in keys(english)}
    assert {grammar.pair_partition(*key) for key in trained} == {"train"}
    for query in collections["en"][0].values():
        assert keys(query) - trained, query


@pytest.mark.parametrize("language", grammar.LANGUAGES)
def test_lexicon(language, bitexts, lexicons, teacher):
    english = {word for pair in teacher for text in pair for word in grammar.split_words(text)}
    foreign = {word for _, text in bitexts[language] for word in grammar.split_words(text)}
    lexicon = lexicons[language]
    for source, translations in lexicon.items():
        assert source in english, source
        assert translations and len(set(translations)) == len(translations)
        for word in (source, *translations):
            assert word == word.lower() and len(word.split()) == 1
        assert set(translations) <= foreign, source
    smallest_high = min(len(lexicons[other]) for other in grammar.HIGH_RESOURCE)
    if language in grammar.LOW_RESOURCE:
        assert 50 < len(lexicon) < smallest_high


@pytest.mark.parametrize("language", grammar.LANGUAGES)
def test_languages_share_few_words_with_english(language, monolingual):
    english = {word for text in monolingual["en"] for word in grammar.split_words(text)}
    foreign = {word for text in monolingual[language] for word in grammar.split_words(text)}
    share = len(foreign & english) / len(foreign)
    print(f"{language}: {share:.1%} of {len(foreign)} words: {sorted(foreign & english)}")
    assert share < 0.03


def test_sentence_lengths_and_verb_positions_differ(bitexts):
    """Position-wise alignment cannot work, because lengths and the verb's position differ."""
    for language, pairs in bitexts.items():
        ratios = [
            len(grammar.split_words(foreign)) / len(grammar.split_words(english))
            for english, foreign in pairs
        ]
        assert 0.4 < median(ratios) < 1.3, language
        assert len(set(ratios)) > 10
    swahili, marathi = median_ratio(bitexts["sw"]), median_ratio(bitexts["mr"])
    assert max(swahili, marathi) < 0.8 < median_ratio(bitexts["tl"])

    tables = grammar.load_tables()
    scene = {"who": "teacher", "verb": "buy", "what": "bread", "where": "market", "time": "today"}
    verb = {"en": "buys", "sw": "ananunua", "so": "iibsadaa", "tl": "Binibili", "mr": "घेतो."}
    place = {
        language: grammar.sentence("act", scene, language).split().index(word)
        for language, word in verb.items()
    }
    last = len(grammar.sentence("act", scene, "mr").split()) - 1
    assert place["tl"] == 0 and place["mr"] == last and place["so"] > place["sw"] >= place["en"]
    assert set(tables.forms["act"]["sentence"]) == set(ALL)


def median_ratio(pairs: list[tuple[str, str]]) -> float:
    return median(
        len(grammar.split_words(foreign)) / len(grammar.split_words(english))
        for english, foreign in pairs
    )


@pytest.mark.parametrize(
    ("frame", "scene", "language", "expected"),
    [
        ("both", {"who": "boy", "verb": "choose", "what": "knife", "also": "drum", "time": "night"},
         "de", "In der Nacht wählt der Junge das Messer und die Trommel aus."),
        ("stay", {"who": "girl", "doing": "rest", "where": "house", "time": "monday"},
         "de", "Im Haus ruht sich das Mädchen am Montag aus."),
        ("quality", {"what": "tea", "quality": "cheap", "time": "today"},
         "fi", "Tee on tänään halpaa."),
        ("quality", {"what": "book", "quality": "cheap", "time": "today"},
         "fi", "Kirja on tänään halpa."),
        ("quality", {"what": "door", "quality": "heavy", "time": "today"},
         "sw", "Leo mlango ni mzito."),
        ("stay", {"who": "mother", "doing": "sit", "where": "house", "time": "today"},
         "fr", "Aujourd'hui, la mère est assise dans la maison."),
        ("want", {"who": "aunt", "verb": "buy", "what": "book", "where": "market"},
         "so", "Eeddadu waxay doonaysaa inay buugga suuqa ku iibsato."),
        ("transfer", {"who": "uncle", "transfer": "give", "what": "book", "other": "boy",
                      "time": "today"}, "mr", "काका आज मुलाला पुस्तक देतो."),
    ],
)  # fmt: skip
def test_agreement(frame, scene, language, expected):
    assert grammar.sentence(frame, scene, language) == expected


def test_unknown_languages_are_refused():
    with pytest.raises(ValueError, match="language: 'xx', expected one of sw"):
        corpus.bitext("xx")
    with pytest.raises(ValueError, match="language: 'en'"):
        corpus.lexicon("en")
    with pytest.raises(ValueError, match="language: 'EN', expected one of en"):
        corpus.collection("EN")


def test_written_files_read_back(tmp_path, bitexts, collections, lexicons):
    paths = corpus.write(tmp_path / "book")
    assert all(path.is_file() for path in paths)
    assert len(paths) == 3 + 2 * 8 + 3 * 7

    def rows(name: str) -> list[list[str]]:
        text = (tmp_path / "book" / name).read_text(encoding="utf-8")
        return [line.split("\t") for line in text.splitlines()]

    queries, documents, qrels = collections["mr"]
    assert [tuple(row) for row in rows("bitext/en-mr.tsv")] == bitexts["mr"]
    assert dict(rows("queries.tsv")) == queries
    lines = (tmp_path / "book" / "documents" / "mr.jsonl").read_text(encoding="utf-8").splitlines()
    assert {row["id"]: row["text"] for row in map(json.loads, lines)} == documents
    judged = [row[0].split() for row in rows("qrels.txt")]
    assert {(q, d): int(g) for q, _, d, g in judged} == {
        (qid, docid): grade for qid, grades in qrels.items() for docid, grade in grades.items()
    }
    known = lexicons["mr"]
    assert rows("lexicon/en-mr.tsv") == [[s, t] for s in known for t in known[s]]
