"""Collections: every format gives the same texts, and inconsistent parts are refused."""

import gzip
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optical.data.collection import Collection, load_collection
from optical.data.texts import read_texts

TSV = "d1\tmaji ni uhai\nd2\tbahari\n"
JSONL = (
    '{"_id": "d1", "title": "", "text": "maji ni uhai"}\n{"docid": "d2", "contents": "bahari"}\n'
)
TREC = """<DOC>
<DOCNO> d1 </DOCNO>
<DOCID> 77 </DOCID>
<DATE> <P> 3 May 1994 </P> </DATE>
<HEADLINE> <P> maji </P> </HEADLINE>
<TEXT>
<P>
ni uhai
</P>
</TEXT>
</DOC>
<doc><docno>d2</docno><text>bahari</text></doc>
"""
TEXTS = {"d1": "maji ni uhai", "d2": "bahari"}

QUERIES = "q1\twater\nq2\tsea\nq3\tsky\n"
QRELS = "q1 0 d1 1\nq2 0 d2 2\nq2 0 d1 0\nq3 0 d1 0\n"


@pytest.fixture
def files(tmp_path):
    """Write files by name; ``.gz`` is compressed."""

    def make(**contents):
        paths = {}
        for name, (file, text) in contents.items():
            paths[name] = tmp_path / file
            data = text.encode() if isinstance(text, str) else text
            paths[name].write_bytes(gzip.compress(data) if file.endswith(".gz") else data)
        return paths

    return make


def parts(**changes):
    usual = {
        "queries": ("queries.tsv", QUERIES),
        "documents": ("docs.sw.tsv", TSV),
        "qrels": ("qrels.tsv", QRELS),
    }
    return usual | changes


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("d.tsv", TSV),
        ("d.tsv.gz", TSV),
        ("d.jsonl", JSONL),
        ("d.jsonl.gz", JSONL),
        ("d.trec", TREC),
        ("d.sgml.gz", TREC),
        ("d.corpus", TSV),
        ("d.corpus.gz", JSONL),
        ("documents", "\n" + TREC),
    ],
)
def test_every_format_gives_the_same_texts(files, file, text):
    assert read_texts(files(documents=(file, text))["documents"]) == TEXTS


def test_titles_are_prepended_and_numbers_are_accepted_as_ids(files):
    text = '{"doc_id": 7, "title": "Moyo", "text": "hupiga"}\n'
    assert read_texts(files(x=("d.jsonl", text))["x"]) == {"7": "Moyo hupiga"}


def test_trec_documents_without_known_elements_keep_all_text(files):
    text = "<DOC>\n<DOCNO>a</DOCNO>\n<BODY>Tom &amp; Jerry</BODY> 3 < 4\n</DOC>\n"
    assert read_texts(files(x=("d.trec", text))["x"]) == {"a": "Tom & Jerry 3 < 4"}


@pytest.mark.parametrize(
    "topics",
    [
        # TREC fields have no closing tags; CLEF fields have them, and a language prefix.
        "<top>\n\n<num> Number: 301 \n<title> Crime\n\n<desc> Description: \nWho is\nit?\n\n"
        "<narr> Narrative: \nlong\n\n</top>\n",
        '<top lang="en"><num>301</num>\n<EN-title> Crime </EN-title>\n'
        "<EN-desc>Who is it?</EN-desc>\n"
        "<EN-narr>long</EN-narr></top>\n",
        # XML: the number is an attribute or an element, and fields have their full names.
        '<?xml version="1.0"?>\n<topics task="x"><topic number="301" type="faceted"><query>Crime'
        "</query>\n<description>Who is it?</description><subtopic>x</subtopic></topic></topics>",
        '<topics>\n<topic lang="en">\n<identifier>301</identifier>\n<title>Crime</title>\n'
        "<description>Who is\nit?</description><narrative>long</narrative>\n</topic>\n</topics>",
    ],
    ids=["trec", "clef", "web", "xml"],
)
def test_topics(files, topics):
    path = files(x=("topics.trec", topics))["x"]
    assert read_texts(path) == {"301": "Crime"}
    assert read_texts(path, topic_fields=("title", "desc")) == {"301": "Crime Who is it?"}


def test_topics_may_be_plain_text(files):
    topics = '<topics><topic number="1">A man with a cough.</topic></topics>'
    assert read_texts(files(x=("topics.xml", topics))["x"]) == {"1": "A man with a cough."}


def test_collection_of_three_files(files, caplog):
    with caplog.at_level(logging.WARNING, "optical"):
        collection = load_collection(**files(**parts()))
    assert collection == Collection(
        name="docs.sw",
        queries={"q1": "water", "q2": "sea"},
        documents=TEXTS,
        qrels={"q1": {"d1": 1}, "q2": {"d2": 2, "d1": 0}},
        queries_without_relevant=("q3",),
    )
    assert "dropped 1 of 3 queries without a relevant document ('q3')" in caplog.text
    assert load_collection(**files(**parts()), name="mine").name == "mine"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_beir_folder(tmp_path, files, suffix, caplog):
    (tmp_path / "scifact" / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": q, "text": t}) for q, t in [("q1", "water"), ("q9", "dev only")]]
    files(
        documents=(f"scifact/corpus.jsonl{suffix}", JSONL),
        queries=(f"scifact/queries.jsonl{suffix}", "\n".join(lines)),
        test=(f"scifact/qrels/test.tsv{suffix}", "query-id\tcorpus-id\tscore\nq1\td1\t1\n"),
        dev=("scifact/qrels/dev.tsv", "query-id\tcorpus-id\tscore\nq9\td2\t1\n"),
    )
    collection = load_collection(tmp_path / "scifact")
    assert (collection.name, collection.documents) == ("scifact", TEXTS)
    assert (collection.queries, collection.qrels) == ({"q1": "water"}, {"q1": {"d1": 1}})
    assert load_collection(tmp_path / "scifact", split="dev").queries == {"q9": "dev only"}
    with pytest.raises(
        ValueError,
        match=r"no qrels/train\.tsv.*available splits: dev, test; select one with --split",
    ):
        load_collection(tmp_path / "scifact", split="train")

    translated = files(x=("translated.tsv", "q1\tmaji\n"))["x"]
    assert load_collection(tmp_path / "scifact", queries=translated).queries == {"q1": "maji"}


def test_a_folder_without_a_collection_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no queries\.jsonl or queries\.jsonl\.gz;"):
        load_collection(tmp_path)


def test_empty_texts_are_kept_and_logged(files, caplog):
    paths = files(**parts(documents=("docs.tsv", "d1\tmaji\nd2\t\n")))
    with caplog.at_level(logging.WARNING, "optical"):
        assert load_collection(**paths).documents == {"d1": "maji", "d2": ""}
    assert "1 of 2 documents have no text ('d2')" in caplog.text


@pytest.mark.parametrize(
    ("part", "file", "text", "message"),
    [
        ("qrels", "r", "q8 0 d1 1\nq9 0 d1 1\n",
         "docs.sw: none of the 3 queries has a relevant document"),
        ("qrels", "r", "".join(f"q1 0 x{i} 1\n" for i in range(5)),
         "docs.sw: none of the 5 judged documents ('x0', 'x1', 'x2', …) is in the collection"),
        ("qrels", "r", "q1 0 d1 0\n",
         "docs.sw: none of the 3 queries has a relevant document"),
        ("qrels", "r", "q1 d1\n", "r:1: 2 columns, judgements need 4 or 3"),
        ("documents", "d.tsv", "d1\tmaji\nd1\tbahari\n",
         "d.tsv:2: id 'd1' appears a second time; ids must be unique"),
        ("documents", "d.tsv", "d1\tmaji\nd2\tbahari\tmto\n",
         "d.tsv:2: 3 columns, a text file needs 2: `id TAB text`; replace tabs inside a text"),
        ("documents", "d.tsv", "d1 maji\n", "d.tsv:1: 1 columns"),
        ("documents", "d.tsv", "", "d.tsv:1: the file has no texts; it needs at least one"),
        ("documents", "d.tsv", "d 1\tmaji\n", "d.tsv:1: id 'd 1' must be one word"),
        ("documents", "d.tsv", b"d1\tmaji\nd2\tcaf\xe9\n", "d.tsv:2: not UTF-8"),
        ("documents", "d.jsonl", '{"id": "d1", "text": "a"}\n{"id": "d2",\n',
         "d.jsonl:2: not JSON (Expecting property name enclosed in double quotes at column 13)"),
        ("documents", "d.jsonl", '{"id": "d1", "body": "a"}\n',
         "d.jsonl:1: no field 'text' (fields found: 'id', 'body'); each line must be like"),
        ("documents", "d.jsonl", '["d1", "a"]\n', "d.jsonl:1: no field 'id' (fields found: none)"),
        ("documents", "d.jsonl", '{"id": "d1", "text": ["a"]}\n',
         "d.jsonl:1: field 'text' is [\"a\"], expected a string"),
        ("documents", "d.jsonl", '{"id": 1.5, "text": "a"}\n',
         "d.jsonl:1: field 'id' is 1.5, expected a string or a whole number"),
        ("documents", "d.trec", "<DOC>\n<TEXT>a</TEXT>\n</DOC>\n",
         "d.trec:1: <DOC> without <DOCNO>; every document needs a number"),
        ("documents", "d.trec", "<DOC>\n<DOCNO>a</DOCNO>\n<DOC>\n",
         "d.trec:1: <DOC> is not closed before the next element starts on line 3; add </DOC>"),
        ("documents", "d.trec", "\n<DOC>\n<DOCNO>a</DOCNO>\n",
         "d.trec:2: <DOC> is not closed at the end of the file; add </DOC>"),
        ("documents", "d.trec", "plain\n", "d.trec:1: the file has no texts"),
        ("queries", "q.trec", "<top>\n<title> Crime\n</top>\n",
         "q.trec:1: <top> without <num>; every topic needs a number"),
        ("queries", "q.trec", "<top>\n<num> 1\n<desc> Crime\n</top>\n",
         "q.trec:1: topic '1' has no <title> (it has: desc); select other fields with"),
    ],
)  # fmt: skip
def test_malformed_or_inconsistent_files_are_refused(files, part, file, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_collection(**files(**parts(**{part: (file, text)})))
    assert "\n" not in str(caught.value)


def test_missing_parts_are_named(files):
    paths = files(**parts())
    with pytest.raises(ValueError, match="no source and no documents=, qrels= given; accepted are"):
        load_collection(queries=paths["queries"])
    with pytest.raises(ValueError, match="is a file; pass it as queries=, documents= or qrels="):
        load_collection(paths["documents"])
    with pytest.raises(FileNotFoundError):
        load_collection(**paths | {"qrels": "no-such-file.tsv"})


def test_a_missing_ir_datasets_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(ImportError, match=r'pip install "optical-ot\[eval\]"'):
        load_collection("wikiclir/sw")


def test_an_unknown_source_is_reported_with_similar_ids(tmp_path, monkeypatch):
    pytest.importorskip("ir_datasets")
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    forms = r"nearest ids: wikiclir/sw.*corpus\.jsonl.*queries=, documents= and qrels="
    with pytest.raises(ValueError, match=forms):
        load_collection("wikiclir/swa")
    with pytest.raises(ValueError, match=r"'wikiclir' has no queries in ir_datasets; choose an id"):
        load_collection("wikiclir")


LOAD = """
import io, json, logging, sys
from optical.data.collection import load_collection
for arguments in json.load(sys.stdin):
    log = io.StringIO()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=log, force=True)
    try:
        loaded = load_collection(**arguments)
        result = [
            loaded.queries, loaded.documents, loaded.qrels, loaded.queries_without_relevant
        ]
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    print(json.dumps([loaded.name, result, log.getvalue()]))
"""


def compressed(path, text):
    path.write_bytes(gzip.compress(text.encode()))


def item(path):
    """Describe a download of ir_datasets whose file exists, so that it is never fetched."""
    return {"url": f"http://localhost:9/{path}", "expected_md5": "0" * 32, "cache_path": path}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Load real ids from tiny files in the formats of WikiCLIR, CLIRMatrix and mMARCO.

    This runs in a separate process, because ir_datasets fixes its folder on import.
    """
    pytest.importorskip("ir_datasets")
    home = tmp_path_factory.mktemp("ir_datasets")

    wikiclir = home / "wikiclir" / "source" / "wiki-clir"
    for folder in ("english", "swahili", "tagalog"):
        (wikiclir / folder).mkdir(parents=True)
    (wikiclir / "english" / "wiki_en.queries").write_text(
        "12\tmolo\tmolo is a town in kenya .\n39\tsea\ta sea is salt water .\n99\tother\tunused .\n"
    )
    (wikiclir / "swahili" / "wiki_sw.documents").write_text(
        "7\tmolo\tmolo ni mji wa kenya\n8\tbahari\tbahari ni maji\n9\tsomo\tni habari\n"
    )
    (wikiclir / "swahili" / "en2sw.rel").write_text("12\t7\t2\n12\t9\t1\n39\t8\t2\n39\t555\t1\n")
    (wikiclir / "tagalog" / "wiki_tl.documents").write_text("7\tmolo\n")
    (wikiclir / "tagalog" / "en2tl.rel").write_text("12\t7\t2\n")
    (home / "translated.tsv").write_text("12\tmji wa molo\n")

    clirmatrix = home / "clirmatrix"
    clirmatrix.mkdir()
    listed = {
        "clirmatrix_docs": {"docs/en": item("en.tsv.gz")},
        "clirmatrix_bi139_base": {"queries/sw_en/test1": item("sw_en.test1.jsonl.gz")},
    }
    queries = [
        {"src_id": "501", "src_query": "Molo", "tgt_results": [["7", 6], ["8", 0]]},
        {"src_id": "502", "src_query": "Anga", "tgt_results": [["7", 0], ["8", 0]]},
    ]
    compressed(clirmatrix / "clirmatrix_downloads.json.gz", json.dumps(listed))
    compressed(clirmatrix / "en.tsv.gz", "7\tMolo is a town\n8\tThe sea\n")
    compressed(clirmatrix / "sw_en.test1.jsonl.gz", "\n".join(map(json.dumps, queries)) + "\n")

    mmarco = home / "mmarco"
    (mmarco / "v2").mkdir(parents=True)
    (mmarco / "v2" / "french_collection.tsv").write_text("0\tla mer\n1\tle pain\n2\tune lampe\n")
    (mmarco / "v2" / "french.queries.dev.tsv").write_text("5\tdu pain\n6\tla mer ?\n")
    # The small judgements are a subset of the full ones.
    (mmarco / "qrels.dev.small.tsv").write_text("5\t0\t1\t1\n")
    (home / "english.tsv").write_text("5\tbread\n")

    requests = {
        "mmarco": {"source": "mmarco/v2/fr/dev/small"},
        "mmarco in English": {
            "source": "mmarco/v2/fr/dev/small", "queries": str(home / "english.tsv"), "name": "en"
        },
        "wikiclir": {"source": "wikiclir/sw"},
        "translated": {
            "source": "wikiclir/sw", "queries": str(home / "translated.tsv"), "name": "mt"
        },
        "damaged": {"source": "wikiclir/tl"},
        "clirmatrix": {"source": "clirmatrix/en/bi139-base/sw/test1"},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        input=json.dumps(list(requests.values())),
        env=os.environ
        | {"IR_DATASETS_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(requests, map(json.loads, done.stdout.splitlines()), strict=True))


def test_wikiclir_id(loaded):
    name, parts, log = loaded["wikiclir"]
    assert name == "wikiclir/sw"
    assert parts == [
        {"12": "molo", "39": "sea"},
        {"7": "molo molo ni mji wa kenya", "8": "bahari bahari ni maji", "9": "somo ni habari"},
        {"12": {"7": 2, "9": 1}, "39": {"8": 2, "555": 1}},
        [],
    ]
    assert "judgements name 1 unknown documents ('555'), which count as not retrieved" in log


def test_mmarco_id(loaded):
    name, parts, _ = loaded["mmarco"]
    assert name == "mmarco/v2/fr/dev/small"
    documents = {"0": "la mer", "1": "le pain", "2": "une lampe"}
    assert parts == [{"5": "du pain"}, documents, {"5": {"1": 1}}, []]
    # English queries from a file for French documents.
    assert loaded["mmarco in English"][1] == [{"5": "bread"}, documents, {"5": {"1": 1}}, []]


def test_translated_queries_replace_those_of_an_id(loaded):
    name, parts, log = loaded["translated"]
    assert (name, parts[0], parts[2]) == ("mt", {"12": "mji wa molo"}, {"12": {"7": 2, "9": 1}})
    assert "judgements name 1 unknown queries ('39'), which are ignored" in log


def test_errors_of_a_damaged_download_name_the_id(loaded):
    _, error, _ = loaded["damaged"]
    assert "OSError: ir_datasets could not provide 'wikiclir/tl': expected 3 fields, got 2" in error


def test_clirmatrix_id(loaded):
    name, parts, _ = loaded["clirmatrix"]
    assert name == "clirmatrix/en/bi139-base/sw/test1"
    assert parts == [
        {"501": "Molo"},
        {"7": "Molo is a town", "8": "The sea"},
        {"501": {"7": 6, "8": 0}},
        ["502"],
    ]


def test_the_shipped_wikiclir_sample():
    root = os.environ.get("OPTICAL_DATA")
    if not root:
        pytest.skip(reason="set OPTICAL_DATA to the folder of the real-data pack")
    folder = Path(root) / "clir" / "wikiclir-sw-mini"
    if not folder.is_dir():
        pytest.skip(reason=f"OPTICAL_DATA has no {folder.relative_to(root)}")
    collection = load_collection(
        queries=folder / "queries.en.tsv",
        documents=folder / "docs.sw.jsonl",
        qrels=folder / "qrels.tsv",
    )
    assert (len(collection.queries), len(collection.documents)) == (40, 200)
    assert collection.queries_without_relevant == ()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("topics.301-350.txt", "<top>\n<num> 301\n<title> Crime\n</top>\n", {"301": "Crime"}),
        ("q.txt", '{"id": 1, "text": "a"}\n', {"1": "a"}),
        ("q", "qid\tquery\n1\ta\n", {"1": "a"}),
        ("q.tsv", "1\t<b> a\n", {"1": "<b> a"}),
        ("q.tsv", "{x}\t{y}\n", {"{x}": "{y}"}),
        ("q.tsv", "id\twater\n", {"id": "water"}),
        ("q.tsv", "1\ta\n\ufeff2\t\ufeffb\n", {"1": "a", "2": "\ufeffb"}),
    ],
)
def test_formats_are_recognised_by_content(files, name, text, expected):
    assert read_texts(files(x=(name, text))["x"]) == expected


def test_fields_of_json_queries_are_chosen(files):
    row = '{"id": "q", "title": "sea", "description": "salt water", "text": "both"}\n'
    path = files(x=("q.jsonl", row))["x"]
    assert read_texts(path) == {"q": "sea both"}
    assert read_texts(path, topic_fields=("description",)) == {"q": "salt water"}
    with pytest.raises(ValueError, match=r"q\.jsonl:1: no field 'narr'"):
        read_texts(path, topic_fields=("narr",))


def test_judgements_may_name_what_is_not_there(files, caplog):
    paths = files(**parts(qrels=("r", "q1 0 d1 1\nq1 0 gone 1\nlost 0 d1 1\n")))
    with caplog.at_level(logging.WARNING, "optical"):
        collection = load_collection(**paths)
    assert collection.qrels == {"q1": {"d1": 1, "gone": 1}}
    assert "judgements name 1 unknown documents ('gone'), which count as not" in caplog.text
    assert "judgements name 1 unknown queries ('lost'), which are ignored" in caplog.text
