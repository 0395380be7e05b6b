"""Nasty files, options and model folders: right results, or one line and exit code 2.

Every case runs a command in this process. None of them loads more than a tiny model.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import threading

import pytest

from optical.cli import main as cli
from optical.data.trec import read_run

BITEXT = "cold water\tmaji baridi\nred book\tkitabu nyekundu\n" * 3
QRELS = "q1 0 d1 1\nq2 0 d2 1\n"
RUN = "q1 Q0 d1 1 2.0 t\nq1 Q0 d2 2 1.0 t\nq2 Q0 d1 1 2.0 t\nq2 Q0 d2 2 1.0 t\n"
# A surrogate without its partner, as JSON.
HALF = '{"id": "d1", "text": "\\ud83d"}\n'
TOPICS = "<top>\n<num> Number: 301\n<title> water\n<desc> Description:\ncold water\n</top>\n"


def run(argv):
    """Run a command and return its exit code."""
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def fails(capfd, argv, message):
    """Check that a command ends with exit code 2 and one line that matches."""
    code = run(argv)
    out, err = capfd.readouterr()
    assert code == 2, out + err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.search(message, last), err
    assert re.match(r"optical( \w+)*: error: ", last) and len(last) < 600, err


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- bitext, read by `lexicon` -------------------------------------------------------------------

GOOD_BITEXT = {
    "bz2": ("b.bz2", bz2.compress(BITEXT.encode())),
    "xz under another name": ("b.tsv", lzma.compress(BITEXT.encode())),
    "two gzip members": ("b", gzip.compress(BITEXT.encode()) + gzip.compress(b"a\tb\n")),
    "byte-order mark in the middle": ("b.tsv", BITEXT + "\ufeff" + BITEXT),
    "header": ("b.tsv", "english\tswahili\n" + BITEXT),
    "crlf": ("b.tsv", BITEXT.replace("\n", "\r\n")),
    "no last line end": ("b.tsv", BITEXT.rstrip("\n")),
    "null side": (
        "b.jsonl",
        '{"source": "cold water", "target": "maji baridi"}\n{"source": "a", "target": null}\n'
        '{"source": "cold", "target": "baridi"}\n',
    ),
    "null translation": (
        "b.jsonl",
        '{"translation": {"en": "cold", "sw": "baridi"}}\n'
        '{"translation": {"en": "e", "sw": null}}\n',
    ),
    "json without a suffix": ("b", '{"source": "cold water", "target": "maji baridi"}\n'),
    "a comma in the name": ("a,b.tsv", BITEXT),
    "line separators inside": ("b.tsv", "cold\u2028water\tmaji\u0085baridi\n"),
}


@pytest.mark.parametrize("case", GOOD_BITEXT)
def test_unusual_bitext_is_read(tmp_path, capfd, case):
    path = put(tmp_path, *GOOD_BITEXT[case])
    argv = ["lexicon", path, "--output", tmp_path / "out.tsv", "--least-count", 1]
    assert run([*argv, "--least-probability", 0.1]) == 0, capfd.readouterr()
    lexicon = (tmp_path / "out.tsv").read_text()
    assert "cold\tbaridi" in lexicon and "\ufeff" not in lexicon and "swahili" not in lexicon


BAD_BITEXT = {
    "utf-16": (BITEXT.encode("utf-16"), r"b:1: not UTF-8 but UTF-16.*iconv -f UTF-16"),
    "utf-16 without a mark": (BITEXT.encode("utf-16-le"), r"b:1: holds NUL characters"),
    "latin-1": ("a\tÄ\n".encode("latin-1"), r"b:1: not UTF-8 \(byte 2"),
    "zip": (b"PK\x03\x04\x14\x00", r"b:1: is a ZIP archive; unpack it with `unzip`"),
    "parquet": (b"PAR1\x15\x04", r"b:1: is a Parquet file; convert it to JSON lines"),
    "truncated xz": (lzma.compress(BITEXT.encode())[:-30], r"b:\d+: damaged xz data"),
    "truncated bz2": (bz2.compress(BITEXT.encode())[:-9], r"b:\d+: damaged bz2 data"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", r"b: is compressed by Zstandard|damaged zst data"),
    "empty": (b"", r"b: no sentence pair in 0 lines"),
    "blank lines": (b"\n\n  \n", r"b: no sentence pair in 0 lines"),
    "one column": (b"a\tb\nabc\n", r"b:2: 1 column, expected 2 or more"),
    "half a character": (
        b'{"source": "a", "target": "\\ud83d"}\n', r"b:1: half of a character"
    ),
    "json of another shape": (b'{"a": 1}\n', r"b:1: keys \['a'\], expected source/target"),
    "deep json": (b'{"source": "a", "target": "b"}\n' + b"[" * 100_000, r"b:2: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BITEXT)
def test_bad_bitext_is_refused_in_one_line(tmp_path, capfd, case):
    data, message = BAD_BITEXT[case]
    path = put(tmp_path, "b", data)
    fails(capfd, ["lexicon", path, "--output", tmp_path / "out.tsv"], message)
    assert os.listdir(tmp_path) == ["b"]


# --- runs and judgements -------------------------------------------------------------------------

GOOD_JUDGED = {
    "plain": (RUN, QRELS),
    "headers": ("qid Q0 docid rank score tag\n" + RUN, "query_id iter doc_id relevance\n" + QRELS),
    "beir": (RUN, "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n"),
    "byte-order marks": ("\ufeff" + RUN, QRELS.replace("q2", "\ufeffq2")),
    "compressed": (bz2.compress(RUN.encode()), lzma.compress(QRELS.encode())),
    "unjudged query": (RUN + "q9 Q0 d1 1 1.0 t\n", QRELS),
}


@pytest.mark.parametrize("case", GOOD_JUDGED)
def test_unusual_runs_and_judgements_are_read(tmp_path, capfd, case):
    pytest.importorskip("ir_measures", reason="the extra `eval` is not installed")
    ranked, judged = (
        put(tmp_path, name, x) for name, x in zip("rq", GOOD_JUDGED[case], strict=True)
    )
    argv = ["evaluate", ranked, "--qrels", judged, "--json", "--measures", "map", "P_1"]
    assert run(argv) == 0
    assert json.loads(capfd.readouterr().out)["mean"] == {"AP": 0.75, "P@1": 0.5}


BAD_JUDGED = {
    "run of five columns": ("q1 Q0 d1 1 2.0\n", QRELS, r"r:1: 5 columns, a run needs 6"),
    "score of words": (RUN + "q2 Q0 d3 1 high t\n", QRELS, r"r:5: score 'high' is not a finite"),
    "nan score": ("q1 Q0 d1 1 nan t\n", QRELS, r"r:1: score 'nan' is not a finite"),
    "float grade": (RUN, "q1 0 d1 1.0\n", r"q:1: grade '1.0' is not a whole number"),
    "repeated": (RUN, QRELS + QRELS, r"q:3: document 'd1' is judged a second time"),
    "no relevant": (RUN, "q1 0 d1 0\n", r"none of the 1 judged queries has a relevant"),
    "no overlap": (RUN, "x1 0 d1 1\n", r"none of the 2 queries of the run .* is judged"),
    "a run as judgements": (RUN, RUN, r"q:1: 6 columns, judgements need 4 or 3"),
    "empty run": ("", QRELS, r"r:1: the file has no lines"),
}


@pytest.mark.parametrize("case", BAD_JUDGED)
def test_bad_runs_and_judgements_are_refused_in_one_line(tmp_path, capfd, case):
    pytest.importorskip("ir_measures", reason="the extra `eval` is not installed")
    ranked, judged, message = BAD_JUDGED[case]
    argv = ["evaluate", put(tmp_path, "r", ranked), "--qrels", put(tmp_path, "q", judged)]
    fails(capfd, argv, message)


def test_mistyped_paths_say_that_there_is_no_such_file(tmp_path, capfd, monkeypatch):
    pytest.importorskip("ir_measures", reason="the extra `eval` is not installed")
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "r.run", RUN)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for qrels in ("q.txt", "./q", "data/q.qrels", "q.tsv.gz", str(tmp_path / "q")):
        fails(capfd, ["evaluate", "r.run", "--qrels", qrels], r"q[.\w]*: no such file")
    fails(capfd, ["evaluate", "r", "--qrels", "r.run"], "r: no such file")
    fails(capfd, ["evaluate", "dangling", "--qrels", "q"], r"dangling: no such file \(a link to")
    fails(capfd, ["evaluate", tmp_path, "--qrels", "r.run"], "is a folder, expected a text file")


def test_pipes_are_read(tmp_path, capfd):
    pytest.importorskip("ir_measures", reason="the extra `eval` is not installed")
    writers = []
    for name, text in (("r", RUN), ("q", QRELS)):
        os.mkfifo(tmp_path / name)
        writers.append(threading.Thread(target=(tmp_path / name).write_text, args=(text,)))
        writers[-1].start()
    argv = ["evaluate", tmp_path / "r", "--qrels", tmp_path / "q", "--json"]
    assert run(argv) == 0
    for writer in writers:
        writer.join()
    assert json.loads(capfd.readouterr().out)["mean"]["AP"] == 0.75


def test_a_training_reads_a_pipe(tmp_path, capfd):
    pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")
    os.mkfifo(tmp_path / "t")
    writer = threading.Thread(target=(tmp_path / "t").write_text, args=("cold water\n" * 9,))
    writer.daemon = True  # were the pipe read again, nobody would write to it
    writer.start()
    argv = ["train", "encoder", "--text", tmp_path / "t", "--output_dir", tmp_path / "out"]
    sizes = ["--hidden_size", 8, "--layers", 1, "--vocabulary_size", 20, "--max_steps", 1]
    assert run([*argv, *sizes]) == 0, capfd.readouterr()


def test_names_of_trec_eval_are_accepted(tmp_path, capfd):
    pytest.importorskip("ir_measures", reason="the extra `eval` is not installed")
    argv = ["evaluate", put(tmp_path, "r", RUN), "--qrels", put(tmp_path, "q", QRELS), "--json"]
    names = "map ndcg_cut_10 recip_rank P.5 recall_100 map_cut_10 ndcg"
    assert run([*argv, "--measures", names]) == 0
    found = json.loads(capfd.readouterr().out)["mean"]
    assert list(found) == ["AP", "nDCG@10", "RR", "P@5", "R@100", "AP@10", "nDCG"]
    fails(capfd, [*argv, "--measures", "ndcg_cut"], "unknown measure 'ndcg_cut'")
    fails(capfd, [*argv, "--measures", "P"], "measure 'P' is incomplete")
    fails(capfd, [*argv, "--measures", f"P@{'9' * 20}"], "unknown measure 'P@9+'")


# --- options that are known to be wrong at once --------------------------------------------------

FILES = ["--queries", "q.tsv", "--documents", "d.tsv"]
BAD_OPTIONS = {
    "search --depth 0": ([*FILES, "--depth", "0"], r"argument --depth: 0, expected 1 or more"),
    "search --batch-size -1": ([*FILES, "--batch-size", "-1"], "--batch-size: -1, expected 1"),
    "search --tag 'a b'": ([*FILES, "--tag", "a b"], r"tag: 'a b', expected one word"),
    "search --tag ''": ([*FILES, "--tag", ""], r"tag: '', expected one word"),
    "search --output ''": ([*FILES, "--output", ""], r"cannot be written \(Is a directory\)"),
    "search --output .": ([*FILES, "--output", "."], r"cannot be written \(Is a directory\)"),
    "search --output q.tsv": ([*FILES, "--output", "q.tsv"], "output: q.tsv is an input of this"),
    "search --output ./d.tsv": ([*FILES, "--output", "./d.tsv"], r"output: \./d.tsv is an input"),
    "lexicon --output b.tsv": ("b.tsv --output b.tsv", "output: b.tsv is an input of this command"),
    "lexicon --output d.tsv": ("q.tsv,d.tsv --output d.tsv", "output: d.tsv is an input of this"),
    "align --output b.tsv": ("m --bitext b.tsv --output b.tsv", "output: b.tsv is an input"),
    "search --output q.tsv/a": ([*FILES, "--output", "q.tsv/a"], "output folder q.tsv cannot be"),
    "search --output a.zst": ([*FILES, "--output", "a.zst"], r"\.zst is not written"),
    "search --passage-stride 3": ([*FILES, "--passage-stride", "3"], "without passage_length"),
    "search without files": (["--queries", "q.tsv"], "nothing to search"),
    "search --queries none": (["--queries", "x", "--documents", "d.tsv"], "x: no such file"),
    "search -- no model": ([*FILES], r"model m: no config\.json in this folder"),
    "search --depth 10**30": ([*FILES, "--depth", 10**30], "0, expected 9223372036854775807"),
    "train teacher --query_length 10**30": (
        f"--model hub --pairs b.tsv --output_dir o --query_length {10**30}", "0, expected 2147"
    ),
    "train distill --max_pairs 10**30": (
        "--teacher hub --bitext b.tsv --role query --output_dir o --max_pairs "
        f"{10**30}", "max_pairs: 10+, expected 2147483647 or less"
    ),
    "compare --seed -1": ("a b --qrels q --seed -1", "--seed: -1, expected 0 or more"),
    "compare --samples 0": ("a b --qrels q --samples 0", "--samples: 0, expected 1 or more"),
    "lexicon --max-pairs -5": ("b.tsv --output o --max-pairs -5", "--max-pairs: -5, expected 1"),
    "lexicon --least-probability 2": (
        "b.tsv --output o --least-probability 2", "expected a number from 0 to 1"
    ),
    "lexicon --output .": ("b.tsv --output .", r"cannot be written \(Is a directory\)"),
    "align --max-pairs -1": ("m --bitext b.tsv --output o --max-pairs -1", "expected 1 or more"),
    "align --pair 0": ("m --bitext b.tsv --output o --pair 0", "--pair: 0, expected 1 or more"),
    "align --epsilon nan": ("m --bitext b.tsv --output o --epsilon nan", "a number above 0"),
    "align --format figure": (
        "m --bitext b.tsv --output o.txt --format figure", r"expected a name in \.png, \.pdf, \.svg"
    ),
    "vectors --worker -1": (
        "m --bitext b.tsv --role query --output o --worker -1", "--worker: -1, expected 0"
    ),
    "export --format tokens": ("m --format tokens --output o", "documents: expected a file"),
    "index --output q.tsv": ("m --documents d.tsv --output q.tsv", r"holds no model|is no folder"),
    "info --seconds -1": ("--seconds -1", "--seconds: -1, expected a number from 0"),
    "warmup --length 0": ("--length 0", "--length: 0, expected 1 or more"),
    "warmup --threads 0": ("--threads 0", "--threads: 0, expected 1 or more"),
    "train encoder --config": ("--output_dir o --config", "--config: expected one argument"),
    "train encoder --config .": ("--output_dir o --config .", "is a folder, expected a text file"),
    "train encoder --config deep": ("--output_dir o --config deep", "deep: not YAML that can be"),
    "train encoder --heads 0": ("--text t --output_dir o --heads 0", "heads: 0, expected 1"),
    "train encoder --layers 0": ("--text t --output_dir o --layers 0", "layers: 0, expected 1"),
    "train encoder --hidden_size 0": (
        "--text t --output_dir o --hidden_size 0", "hidden_size: 0, expected 1"
    ),
    "train encoder --vocabulary_size -5": (
        "--text t --output_dir o --vocabulary_size -5", "vocabulary_size: -5, expected 1"
    ),
    # Tokenizers would abort the process.
    "train encoder --vocabulary_size 10**12": (
        "--text t --output_dir o --vocabulary_size 1000000000000", "0, expected 10000000 or less"
    ),
    "train encoder --max_steps 0": (
        "--text t --output_dir o --max_steps 0", "max_steps: 0, expected 1 or more, or -1"
    ),
    "train encoder --seed -1": ("--text t --output_dir o --seed -1", "seed: -1, expected a num"),
    "train encoder --text none": ("--text none --output_dir o", "none: no such file"),
    "train encoder --report_to": (
        "--text t --output_dir o --report_to swanlab", "report_to: swanlab needs the package"
    ),
    "train teacher --dimension -4": (
        "--model m --pairs b.tsv --output_dir o --dimension -4", "dimension: -4, expected 1"
    ),
    "train teacher --document_length -1": (
        "--model m --pairs b.tsv --output_dir o --document_length -1", "document_length: -1, exp"
    ),
    "train teacher --model none": (
        "--model ./none --pairs b.tsv --output_dir o", r"model \./none: no such folder"
    ),
    "train distill --max_length": (
        '--teacher hub --role query --bitext b.tsv --output_dir o --max_length {"doc":8}',
        "max_length: .*, expected a number of tokens",
    ),
    "train distill --bitext bad": (
        "--teacher hub --role query --bitext bad.tsv --output_dir o", r"bad\.tsv:2: 1 column"
    ),
    "train distill --teacher_vectors": (
        "--teacher hub --role query --bitext b.tsv --teacher_vectors m --output_dir o",
        "teacher_vectors: m holds no token store",
    ),
    "train codeswitch --lexicon": (
        "--model hub --pairs b.tsv --lexicon sw=none.tsv --output_dir o", r"none\.tsv: no such file"
    ),
    "train distill --output_dir used": (
        "--teacher hub --role query --bitext b.tsv --output_dir used", "holds checkpoints; add --re"
    ),
    "train transfer --output_dir used": (
        "--model hub --bitext b.tsv --output_dir used", r"used holds a model \(final\)"
    ),
    "train distill --output_dir b.tsv": (
        "--teacher hub --role query --bitext b.tsv --output_dir b.tsv", "output folder b.tsv cannot"
    ),
}  # fmt: skip


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with small inputs, an empty model folder and a used output folder."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "q.tsv", "q1\twater\n")
    put(tmp_path, "d.tsv", "d1\tmaji\n")
    put(tmp_path, "b.tsv", BITEXT)
    put(tmp_path, "bad.tsv", "a\tb\nabc\n")
    put(tmp_path, "t", "water is cold\n")
    put(tmp_path, "deep", "[" * 5000)
    for name in ("m", "used/checkpoint-3", "used/final"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused_in_one_line(desk, capfd, case):
    pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")
    command = case.split(" --")[0].split()[: 2 if case.startswith("train") else 1]
    words, message = BAD_OPTIONS[case]
    words = words.split() if isinstance(words, str) else words
    if command == ["search"]:
        words = ["m", *([] if "--output" in words else ["--output", "o.run"]), *words]
    fails(capfd, [*command, *words], message)


def test_bad_options_are_refused_before_heavy_imports(desk):
    pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")
    commands = []
    for case, (words, _) in BAD_OPTIONS.items():
        command = case.split(" --")[0].split()[: 2 if case.startswith("train") else 1]
        words = words.split() if isinstance(words, str) else words
        if command == ["search"]:
            words = ["m", *([] if "--output" in words else ["--output", "o.run"]), *words]
        # Transformers alone knows --report_to.
        if "report_to" not in case:
            commands.append([*command, *words])
    code = """
        import json, sys
        from optical.cli import main
        for argv in json.load(sys.stdin):
            try:
                code = main.main(argv)
            except SystemExit as stop:
                code = stop.code
            heavy = {"transformers", "sentence_transformers", "datasets"} & sys.modules.keys()
            assert code == 2 and not heavy, (argv, code, heavy)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- texts, searched with a tiny model -----------------------------------------------------------

GOOD_TEXTS = {
    "topics under .txt": ("topics.301-350.txt", TOPICS, "301"),
    "topics without a suffix": ("topics", TOPICS, "301"),
    "header": ("q.tsv", "query_id\ttext\n301\twater\n", "301"),
    "json under .txt": ("q.txt", '{"_id": 301, "text": "water"}\n', "301"),
    "null text": ("q.jsonl", '{"id": "301", "text": null}\n', "301"),
    "null title": ("q.jsonl", '{"id": "301", "title": null, "text": "water"}\n', "301"),
    "a mark in the middle": ("q.tsv", "1\ta\n\ufeff301\twater\n", "301"),
    "emoji and zero-width marks": ("q.tsv", "301\t👩\u200d🌾 \u202e water\n", "301"),
}


@pytest.mark.parametrize("case", GOOD_TEXTS)
def test_unusual_texts_are_searched(tmp_path, capfd, tiny_models, case):
    name, text, key = GOOD_TEXTS[case]
    queries = put(tmp_path, name, text)
    documents = put(tmp_path, "d.tsv", "d1\tmaji\nd2\twater\n")
    model = tmp_path / "my model"
    model.symlink_to(tiny_models.teacher)
    argv = ["search", model, "--queries", queries, "--documents", documents]
    assert run([*argv, "--output", tmp_path / "o.run"]) == 0, capfd.readouterr()
    assert key in read_run(tmp_path / "o.run")
    # The tag of a folder with a space is one word.
    assert (tmp_path / "o.run").read_text().split("\n")[0].endswith(" my_model")


BAD_TEXTS = {
    "half a character": (HALF, r"d:1: half of a character"),
    "null id": ('{"id": null, "text": "a"}\n', r"d:1: field 'id' is null, expected a string or"),
    "truth as id": ('{"id": true, "text": "a"}\n', r"d:1: field 'id' is true, expected"),
    "number as title": ('{"id": "a", "title": 5, "text": "a"}\n', r"d:1: field 'title' is 5"),
    "three columns": ("d1\ta\tb\n", r"d:1: 3 columns, a text file needs 2"),
    "id with a space": ("d 1\ta\n", r"d:1: id 'd 1' must be one word"),
    "repeated id": ("d1\ta\nd1\tb\n", r"d:2: id 'd1' appears a second time"),
    "header only": ("id\ttext\n", r"d:1: the file has no texts"),
    "unclosed document": ("<DOC>\n<DOCNO>1</DOCNO>\n", r"d:1: <DOC> is not closed"),
    "indented json": ('{\n "id": "a"\n}\n', r"d:1: (not JSON|1 columns)"),
    "utf-32": ("d1\ta\n".encode("utf-32"), r"d:1: not UTF-8 but UTF-32"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_are_refused_in_one_line(tmp_path, capfd, tiny_models, case):
    data, message = BAD_TEXTS[case]
    queries, documents = put(tmp_path, "q.tsv", "q1\ta\n"), put(tmp_path, "d", data)
    argv = ["search", tiny_models.teacher, "--queries", queries, "--documents", documents]
    fails(capfd, [*argv, "--output", tmp_path / "o.run"], message)
    assert not (tmp_path / "o.run").exists()


def test_topic_fields_are_chosen(tmp_path, capfd, tiny_models):
    queries = put(tmp_path, "topics.txt", TOPICS)
    documents = put(tmp_path, "d.tsv", "d1\tmaji\n")
    argv = ["search", tiny_models.teacher, "--queries", queries, "--documents", documents]
    argv += ["--output", tmp_path / "o.run"]
    assert run([*argv, "--query-field", "title", "--query-field", "description"]) == 0
    fails(capfd, [*argv, "--query-field", "narr"], r"topic .* has no <narr> .*--query-field")
    argv[3] = put(tmp_path, "q.tsv", "q1\twater\n")
    fails(capfd, [*argv, "--query-field", "title"], "no field 'title' to select")


def test_collections_with_unknown_ids_are_searched(tmp_path, capfd, tiny_models):
    folder = tmp_path / "arguana"
    rows = [{"_id": key, "text": text} for key, text in (("a", "water"), ("b", "sea"))]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    put(folder, "corpus.jsonl", lines)
    put(folder, "queries.jsonl", lines)
    judged = "query-id\tcorpus-id\tscore\na\tb\t1\nb\ta\t1\nb\tgone\t1\nlost\ta\t1\n"
    put(folder, "qrels/dev.tsv", judged)
    argv = ["search", tiny_models.teacher, "--collection", folder, "--output", tmp_path / "o.run"]
    fails(capfd, argv, r"no qrels/test\.tsv.*available splits: dev; select one with --split")
    argv += ["--split", "dev", "--depth", "1", "--ignore-identical-ids"]
    assert run(argv) == 0, capfd.readouterr()
    assert {q: list(hits) for q, hits in read_run(tmp_path / "o.run").items()} == {
        "a": ["b"],
        "b": ["a"],
    }
    capfd.readouterr()
    argv = ["evaluate", tmp_path / "o.run", "--qrels", folder, "--split", "dev", "--json"]
    assert run([*argv, "--measures", "AP"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["queries"] == 2 and found["mean"] == {"AP": 0.75}
    # A search needs no judgements at all.
    shutil.rmtree(folder / "qrels")
    argv = ["search", tiny_models.teacher, "--collection", folder, "--output", tmp_path / "p.run"]
    assert run(argv) == 0 and len(read_run(tmp_path / "p.run")) == 2


def test_devices_and_links_as_outputs(tmp_path, capfd, tiny_models):
    queries, documents = put(tmp_path, "q.tsv", "q1\twater\n"), put(tmp_path, "d.tsv", "d1\ta\n")
    argv = ["search", tiny_models.teacher, "--queries", queries, "--documents", documents]
    assert run([*argv, "--output", "/dev/null"]) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    capfd.readouterr()
    assert run([*argv, "--output", "/dev/stdout"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("q1 Q0 d1 1 ") and len(out.splitlines()) == 1
    assert "/dev/stdout: 1 queries" in err
    real = put(tmp_path, "real.run", "old\n")
    (tmp_path / "link.run").symlink_to(real)
    assert run([*argv, "--output", tmp_path / "link.run"]) == 0
    assert (tmp_path / "link.run").is_symlink() and real.read_text().startswith("q1 Q0 d1")
    fails(capfd, [*argv, "--output", "/dev/full"], "/dev/full cannot be written")


# --- model folders -------------------------------------------------------------------------------


def spoil(name, content):
    """Return a function that replaces a file of a model folder."""

    def change(folder):
        # Checksums would find the change before the libraries see it.
        (folder / "checksums.json").unlink(missing_ok=True)
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edit(name, **values):
    def change(folder):
        content = json.loads((folder / name).read_text()) | values
        spoil(name, json.dumps(content))(folder)

    return change


BAD_MODELS = {
    "no config": (spoil("config.json", None), "model .*"),
    "config of garbage": (spoil("config.json", b"\xff{"), "cannot be loaded"),
    "config of a list": (spoil("config.json", "[]"), "cannot be loaded"),
    "config of another size": (edit("config.json", hidden_size=12), "cannot be loaded"),
    "config without heads": (edit("config.json", num_attention_heads=0), "cannot be loaded"),
    "config of an unknown kind": (edit("config.json", model_type="zzz"), "cannot be loaded"),
    "torn weights": (spoil("model.safetensors", b"\x08\0\0\0"), "cannot be loaded"),
    "empty weights": (spoil("model.safetensors", b""), "cannot be loaded"),
    "no weights": (spoil("model.safetensors", None), "cannot be loaded"),
    "pickled weights": (
        lambda folder: (
            spoil("model.safetensors", None)(folder),
            spoil("pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")(folder),
        ),
        "cannot be loaded",
    ),
    "tokenizer of garbage": (spoil("tokenizer.json", "{}"), "cannot be loaded|tokenizer"),
    "modules of garbage": (spoil("modules.json", "{"), "cannot be loaded"),
    "modules of a list of nothing": (spoil("modules.json", "[]"), "model .*"),
    "unknown module": (
        spoil("modules.json", '[{"idx": 0, "name": "0", "path": "", "type": "no.such.Module"}]'),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_folders_are_refused_in_one_line(tmp_path, capfd, tiny_models, case):
    change, message = BAD_MODELS[case]
    model = tmp_path / "m"
    shutil.copytree(tiny_models.teacher, model)
    change(model)
    queries, documents = put(tmp_path, "q.tsv", "q1\twater\n"), put(tmp_path, "d.tsv", "d1\ta\n")
    argv = ["search", model, "--queries", queries, "--documents", documents]
    fails(capfd, [*argv, "--output", tmp_path / "o.run"], message)
    assert not (tmp_path / "o.run").exists() and not os.path.exists("ran")


def test_mistyped_model_folders_are_told_at_once(tmp_path, capfd, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "q.tsv", "q1\ta\n")
    (tmp_path / "xlmr-like").mkdir()
    put(tmp_path, "runs/distill-sw/final/config.json", "{}")
    for name, message in {
        "xlmr-lik": r"no such folder; did you mean xlmr-like\?",
        "runs/distil-sw": r"no such folder; did you mean runs/distill-sw\?",
        "runs/distill-sw": r".*holds no model; did you mean runs/distill-sw/final\?",
        "my model": "no such folder",
        "q.tsv": "is a file, expected a folder",
    }.items():
        argv = ["search", name, "--queries", "q.tsv", "--documents", "q.tsv", "--output", "o"]
        fails(capfd, argv, f"model {name}: {message}")
