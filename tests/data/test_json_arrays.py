"""JSON arrays where JSON lines are accepted, in every layout, and topics of HC4 and NeuCLIR."""

import json

import pytest

from optical.data import read_bitext_pairs, read_texts, read_training_pairs
from optical.data.texts import read_sentences

TEXTS = [
    {"id": "d1", "title": "Maji", "text": 'he said "[1], {2}" \n\u00e9'},
    {"id": 2, "text": None, "more": {"a": [1, {"b": []}], "c": {}}},
    {"id": "d3", "text": "kitabu"},
]
LAYOUTS = {
    "one line": lambda rows: json.dumps(rows),
    "pretty": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "an object a line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "blank lines": lambda rows: "\n\n " + json.dumps(rows, indent=0).replace("\n", "\n\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.tsv", "x"])
def test_arrays_are_read_as_lines(tmp_path, layout, name):
    path, lines = tmp_path / name, tmp_path / "lines.jsonl"
    path.write_text(LAYOUTS[layout](TEXTS))
    lines.write_text("\n".join(map(json.dumps, TEXTS)))
    assert read_texts(path) == read_texts(lines)
    assert len(read_texts(path)) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_of_json_lines_reads_arrays(tmp_path, layout):
    path = tmp_path / "x.json"
    path.write_text(LAYOUTS[layout]([{"source": "water", "target": "maji"}]))
    assert read_bitext_pairs(path) == [("water", "maji")]
    path.write_text(LAYOUTS[layout]([{"query": "q", "pos": ["a", "b"], "neg": ["c"]}]))
    assert read_training_pairs([str(path)]) == [("q", "a", "c"), ("q", "b", "c")]
    path.write_text(LAYOUTS[layout]([{"text": "one"}, {"text": "two"}]))
    assert read_sentences(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "a", "text": "b"}', r"x.json:1: the JSON array is not closed"),
        ('[\n{"id": "a", "text": "b"},\n', r"x.json:2: the JSON array is not closed"),
        ('[\n{"id": "a",\n"text": tru\n}]', r"x.json:3: not a JSON array \(Expecting value\)"),
        ('[{"id": "a", "text": "b"}\n{"id": "c"}]', r"x.json:2: not a JSON array \(Expecting ','"),
        ('[{"id": "a", "text": "b"}]\n{}', r"x.json:2: not a JSON array"),
        ('[{"id": "a", "text": "one\ntwo"}]', r"x.json:1: not a JSON array"),
        ('[{"id": "a", "text": "b"},]', r"x.json:1: not a JSON array"),
        ('[\n{"id": "a", "text": "b"},\n{"id": "a",\n"text": "b"}]', r"x.json:3: id 'a' appears"),
        ('[\n{"id": "a", "text": "b"}, 7]', r"x.json:2: no field 'id'"),
        ("[\n]\n", r"x.json:1: the file has no texts"),
    ],
)
def test_errors_name_the_line_of_the_element(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_sentences_that_begin_with_a_bracket_stay_sentences(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("[Music]\n[1] A note.\n")
    assert read_sentences(path) == ["[Music]", "[1] A note."]


def test_topics_of_neuclir(tmp_path):
    version = {"lang": "fas", "topic_title": "...", "topic_description": "..."}
    english = {"lang": "eng", "topic_title": "Ice", "topic_description": "Is it cold?"}
    topics = [{"topic_id": "200", "topics": [version, english], "narratives": {}}]
    path = tmp_path / "topics.jsonl"
    path.write_text("\n".join(map(json.dumps, topics)))
    assert read_texts(path) == {"200": "Ice"}
    assert read_texts(path, topic_fields=["title", "description"]) == {"200": "Ice Is it cold?"}
    with pytest.raises(ValueError, match="no field 'narrative'"):
        read_texts(path, topic_fields=["narrative"])
    path.write_text(json.dumps([{**topics[0], "topics": [version]}]))
    with pytest.raises(ValueError, match=r"topics.jsonl:1: no topic in English"):
        read_texts(path)
