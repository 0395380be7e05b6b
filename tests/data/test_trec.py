"""TREC runs and judgements: round trips, order in trec_eval, and errors of malformed files."""

import gzip
import os
import random
import re

import pytest

from optical.data.trec import ranked, read_qrels, read_run, write_qrels, write_run


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_order_is_descending_score_then_descending_id():
    assert ranked({"a": 1.0, "b": 2.0, "c": 1.0}) == [("b", 2.0), ("c", 1.0), ("a", 1.0)]


@pytest.mark.parametrize("name", ["a.run", "a.run.gz"])
def test_a_run_is_read_back_with_every_digit(tmp_path, name):
    generator = random.Random(0)
    run = {f"q{q}": {f"d{d}": generator.gauss(0, 10) for d in range(50)} for q in range(3)}
    run["q0"]["d7"] = run["q0"]["d8"]
    write_run(run, tmp_path / name, tag="runs/sw")
    reread = read_run(tmp_path / name)
    assert reread == run
    assert [list(reread[q]) for q in run] == [[d for d, _ in ranked(run[q])] for q in run]


def test_lines_of_a_written_run(tmp_path):
    write_run({"q": {"b": 0.5, "a": 2.0}, "empty": {}}, tmp_path / "x" / "a.run", tag="t")
    assert (tmp_path / "x" / "a.run").read_text() == "q Q0 a 1 2.0 t\nq Q0 b 2 0.5 t\n"


def test_equal_runs_give_equal_compressed_bytes(tmp_path):
    for name in ("a.gz", "b.gz"):
        write_run({"q": {"a": 1.0}}, tmp_path / name, tag="t")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_gzip_is_detected_and_a_byte_order_mark_dropped(tmp_path):
    path = tmp_path / "a.run"
    path.write_bytes(gzip.compress("\ufeffq Q0 a 1 1.5 t\r\n\n".encode()))
    assert read_run(path) == {"q": {"a": 1.5}}


@pytest.mark.parametrize(
    "scores",
    [
        [1.0 + 1e-9, 1.0, 1.0 - 1e-9],
        [1.0, 1.0, 1.0 - 1e-12, 1.0 - 1e-12, 1.0 - 2e-8],
        [1e-9, 0.0, -1e-300, -1e-50],
        [-5.0, -5.0 - 1e-12, -5.0 - 2e-12, -6.0],
        [3.0, 2.0, 1.0],
    ],
)
def test_trec_eval_ranks_documents_in_the_written_order(tmp_path, scores):
    """trec_eval compares float32 scores and breaks ties by id, which must not change the order."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    for seed in range(5):
        ids = [f"d{i}" for i in range(len(scores))]
        random.Random(seed).shuffle(ids)
        run = {"q": dict(zip(ids, scores, strict=True))}
        write_run(run, tmp_path / "a.run", tag="t")
        reread = read_run(tmp_path / "a.run")
        order = [docid for docid, _ in ranked(run["q"])]
        assert list(reread["q"]) == order
        for rank, docid in enumerate(order, start=1):
            evaluator = pytrec_eval.RelevanceEvaluator({"q": {docid: 1}}, {"recip_rank"})
            assert evaluator.evaluate(reread)["q"]["recip_rank"] == pytest.approx(1 / rank)


def test_only_colliding_scores_are_changed(tmp_path):
    write_run({"q": {"a": 0.1, "b": 0.1 - 1e-12, "c": 0.05}}, tmp_path / "a.run", tag="t")
    reread = read_run(tmp_path / "a.run")["q"]
    assert (reread["a"], reread["c"]) == (0.1, 0.05)
    assert 0.1 - 1e-7 < reread["b"] < 0.1


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "a.run"
    write_run({"q": {"a": 1.0}}, path, tag="t")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not a finite"):
        write_run({"q": {"a": 1.0}, "r": {"b": float("nan")}}, path, tag="t")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.run"]


@pytest.mark.parametrize(
    ("run", "tag", "message"),
    [
        (
            {"q": {"a": float("inf")}},
            "t",
            "score inf of document 'a' for query 'q' is not a finite",
        ),
        ({"q": {"a": 1e39}}, "t", "not a finite float32 number"),
        ({"q 1": {"a": 1.0}}, "t", "query id 'q 1' must be one word"),
        ({"q": {"": 1.0}}, "t", "document id '' must be one word"),
        ({"q": {"a": 1.0}}, "my tag", "tag 'my tag' must be one word"),
    ],
)
def test_a_run_that_the_format_cannot_hold_is_refused(tmp_path, run, tag, message):
    with pytest.raises(ValueError, match=message):
        write_run(run, tmp_path / "a.run", tag=tag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 a 1 1.0\n", "a.run:1: 5 columns, a run needs 6: qid Q0 docid rank score tag"),
        ("q Q0 a 1 1.0 t\n\nq Q0 a b 2 1.0 t\n", "a.run:3: 7 columns"),
        (
            "q Q0 a 1 high t\n",
            "a.run:1: score 'high' is not a finite number; the score is the fifth",
        ),
        ("q Q0 a 1 nan t\n", "a.run:1: score 'nan' is not a finite number"),
        ("q Q0 a 1 1_0 t\n", "a.run:1: score '1_0' is not a finite number"),
        ("q Q0 a 1 \u0662 t\n", "a.run:1: score '\u0662' is not a finite number"),
        (
            "q Q0 a 1 2 t\nq Q0 a 2 1 t\n",
            "a.run:2: document 'a' appears a second time for query 'q'",
        ),
        ("\n", "a.run:1: the file has no lines"),
    ],
)
def test_errors_of_a_malformed_run_name_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_run(write(tmp_path / "a.run", text))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_errors_of_undecodable_files_name_file_and_line(tmp_path):
    path = tmp_path / "a.run"
    path.write_bytes(b"q Q0 a 1 1.0 t\nq Q0 caf\xe9 2 0.5 t\n")
    with pytest.raises(ValueError, match=r"a\.run:2: not UTF-8"):
        read_run(path)
    path.write_bytes(gzip.compress(b"q Q0 a 1 1.0 t\n")[:-9])
    with pytest.raises(ValueError, match=r"a\.run:\d+: damaged gzip"):
        read_run(path)
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "none.run")


@pytest.mark.parametrize(
    "text",
    [
        "q1 0 d1 2\nq1 0 d2 0\nq2 Q0 d1 -1\n",
        "q1\t0\td1\t2\r\nq1\t0\td2\t0\r\nq2\t0\td1\t-1\r\n",
        "q1\td1\t2\nq1\td2\t0\n\nq2\td1\t-1\n",
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td1\t-1\n",
    ],
    ids=["trec", "tabs", "wikiclir", "beir"],
)
def test_judgements_in_every_format(tmp_path, text):
    expected = {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": -1}}
    assert read_qrels(write(tmp_path / "qrels", text)) == expected
    write_qrels(expected, tmp_path / "again.gz")
    assert read_qrels(tmp_path / "again.gz") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q d\n", "qrels:1: 2 columns, judgements need 4 or 3: `qid 0 docid grade`"),
        ("q 0 d 1\nq d 1\n", "qrels:2: 3 columns, judgements need 4 as on the first line"),
        ("q d 1\nq d e 1\n", "qrels:2: 4 columns, judgements need 3 as on the first line"),
        ("q 0 d 1.5\n", "qrels:1: grade '1.5' is not a whole number; the grade is the last column"),
        ("q 0 d 1_0\n", "qrels:1: grade '1_0' is not a whole number"),
        ("q 0 d \u0662\n", "qrels:1: grade '\u0662' is not a whole number"),
        ("q 0 d 2147483648\n", "qrels:1: grade '2147483648' is beyond 1000000"),
        ("q 0 d -1000001\n", "qrels:1: grade '-1000001' is beyond 1000000"),
        ("q 0 d 1\nq 0 d 1\n", "qrels:2: document 'd' is judged a second time for query 'q'"),
        ("", "qrels:1: the file has no judgements"),
        ("query-id\tcorpus-id\tscore\n", "qrels:1: the file has no judgements"),
    ],
)
def test_errors_of_malformed_judgements_name_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_qrels(write(tmp_path / "qrels", text))


def test_writing_judgements_with_spaces_in_ids_is_refused(tmp_path):
    with pytest.raises(ValueError, match="document id 'd 1' must be one word"):
        write_qrels({"q": {"d 1": 1}}, tmp_path / "qrels")
