"""The commands that use trained models: align, export, index, search of an index, train."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")

from optical.cli import main as cli
from optical.data.trec import read_run
from optical.retrieval.index import LanceIndex


def run_json(capsys, argv):
    """Run a command; return the JSON that it prints."""
    assert cli.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, argv, message):
    try:
        code = cli.main(list(map(str, argv)))
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err
    assert re.search(message, err.splitlines()[-1]), err


def test_align(capsys, world, tiny_models, tmp_path):
    bitext = world / "bitext/en-sw.tsv"
    argv = ["align", tiny_models.teacher, "--bitext", bitext, "--max-pairs", 5, "--output"]
    found = run_json(capsys, [*argv, tmp_path / "a.align"])
    lines = (tmp_path / "a.align").read_text().splitlines()
    assert found["pairs"] == len(lines) == 5
    links = [link for line in lines for link in line.split()]
    assert found["links"] == len(links) > 0
    assert all(re.fullmatch(r"[0-4]-[0-2]", link) for link in links)
    run_json(capsys, [*argv, tmp_path / "a.tsv", "--format", "tsv"])
    head, *rows = (line.split("\t") for line in (tmp_path / "a.tsv").read_text().splitlines())
    assert head[0] == "pair" and [f"{row[1]}-{row[3]}" for row in rows] == links
    pairs = [line.split("\t") for line in bitext.read_text().splitlines()[:5]]
    for number, e, english, o, other, share in rows:
        one, two = pairs[int(number) - 1]
        assert (one.split()[int(e)], two.split()[int(o)]) == (english, other)
        assert 0 < float(share) <= 1
    found = run_json(capsys, [*argv[:4], "--output", tmp_path / "lex.tsv", "--format", "lexicon"])
    assert found["entries"] == len((tmp_path / "lex.tsv").read_text().splitlines()) > 0
    pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
    run_json(capsys, [*argv, tmp_path / "plan.png", "--format", "figure", "--pair", 2])
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    figure = [*argv, tmp_path / "plan.png", "--format", "figure"]
    fails(capsys, [*figure, "--pair", 9], "pair: 9, expected the number of a pair in")


def test_exported_token_vectors_are_searched_without_the_texts(
    capsys, world, tiny_models, tmp_path
):
    documents, queries = world / "documents/en.jsonl", world / "queries.tsv"
    argv = ["export", tiny_models.teacher, "--format", "tokens", "--output", tmp_path / "index"]
    assert run_json(capsys, [*argv, "--documents", documents])["documents"] == 48
    fails(capsys, argv, "documents: expected a file with --format tokens")
    search = ["search", tiny_models.teacher, "--queries", queries, "--depth", 7]
    found = run_json(
        capsys, [*search, "--index", tmp_path / "index", "--output", tmp_path / "index.run"]
    )
    assert found["documents searched"] == 48
    run_json(capsys, [*search, "--documents", documents, "--output", tmp_path / "texts.run"])
    one, two = (read_run(tmp_path / f"{name}.run") for name in ("index", "texts"))
    assert one.keys() == two.keys() and len(one) == found["queries"]
    for query, scores in two.items():
        assert list(one[query].values()) == pytest.approx(list(scores.values()), abs=2e-5)
    both = [*search, "--index", tmp_path / "index", "--documents", documents]
    fails(capsys, [*both, "--output", tmp_path / "x.run"], "documents: given with --index")
    search = ["search", tiny_models.wide, "--queries", queries, "--index", tmp_path / "index"]
    fails(capsys, [*search, "--output", tmp_path / "x.run"], "vectors of size 16, expected .* 24")
    search[1] = tiny_models.mixed
    output = ["--output", tmp_path / "x.run"]
    fails(capsys, [*search, *output], "its documents were encoded by another model")
    run_json(capsys, [*search, *output, "--any-model"])


def test_index_command_writes_a_database(capsys, world, tiny_models, tmp_path):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    documents, base = world / "documents/en.jsonl", tmp_path / "base"
    argv = ["index", tiny_models.teacher, "--documents", documents, "--output", base]
    assert run_json(capsys, argv) == {"output": str(base), "added": 48, "documents": 48}
    assert run_json(capsys, argv)["added"] == 0
    argv = ["search", tiny_models.teacher, "--index", base, "--queries", world / "queries.tsv"]
    found = run_json(capsys, [*argv, "--depth", 5, "--output", tmp_path / "a.run"])
    run = read_run(tmp_path / "a.run")
    assert len(run) == found["queries"] and {len(hits) for hits in run.values()} == {5}
    fails(capsys, ["index", tiny_models.teacher, "--output", base], "--collection or --documents")


def test_processes_of_torchrun_divide_the_documents(
    capsys, world, tiny_models, tmp_path, monkeypatch
):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    argv = [tiny_models.teacher, "--documents", world / "documents/en.jsonl", "--output"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, added in (("1", 0), ("0", 48)):
        monkeypatch.setenv("RANK", rank)
        report = run_json(capsys, ["index", *argv, tmp_path / "base"])
        assert report == {"output": str(tmp_path / "base"), "added": added, "documents": added}
    report = run_json(capsys, ["export", "--format", "tokens", *argv, tmp_path / "files"])
    assert report["documents"] == 48
    fails(
        capsys, ["index", *argv, tmp_path / "base", "--approximate"], "given to several processes"
    )
    wrong = ["index", *argv, tmp_path / "base", "--worker", "2"]
    fails(capsys, wrong, "worker: 2, expected a number from 0 to 1")
    fails(capsys, [*wrong[:-2], "--device", "cuda:7"], "device: cuda:7, but PyTorch finds")
    fails(capsys, [*wrong[:-2], "--device", "gpu"], "device: 'gpu', expected a name such as cpu")


def test_approximate_search_prints_its_recall(capsys, world, tiny_models, tmp_path):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    texts = "".join(f"m{i}\tthe {i} fish {i % 7} water\n" for i in range(300))
    (tmp_path / "many.tsv").write_text(texts)
    base, argv = tmp_path / "base", [tiny_models.teacher, "--device", "cpu"]
    report = run_json(
        capsys, ["index", *argv, "--documents", tmp_path / "many.tsv", "--output", base]
    )
    assert report["added"] == 300
    search = ["search", *argv, "--queries", world / "queries.tsv", "--index", base]
    search += ["--output", tmp_path / "a.run", "--depth", 20]
    fails(capsys, [*search, "--approximate"], "has no approximate index")
    build = ["index", *argv, "--documents", tmp_path / "many.tsv", "--output", base]
    assert run_json(capsys, [*build, "--approximate"])["added"] == 0
    # Every document is a candidate, so what is left is the noise of equal scores.
    assert 0.9 < run_json(capsys, [*search, "--approximate"])["recall"] <= 1
    assert "recall" not in run_json(capsys, search)
    at = search.index("--index")
    search[at : at + 2] = ["--documents", tmp_path / "many.tsv"]
    fails(capsys, [*search, "--approximate"], "given without --index")


@pytest.mark.slow
def test_torchrun_writes_one_database(tiny_models, tmp_path):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    texts = "".join(f"m{i}\tthe {i} fish\n" for i in range(1500))
    (tmp_path / "many.tsv").write_text(texts)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "-m", "optical.cli", "index", tiny_models.teacher]
    command += ["--documents", tmp_path / "many.tsv", "--output", tmp_path / "base", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    added = [json.loads(line)["added"] for line in done.stdout.splitlines() if '"added"' in line]
    assert sorted(added) == [476, 1024]
    from optical.retrieval.index import LanceIndex

    index = LanceIndex(tmp_path / "base")
    assert len(index) == index.table.count_rows() == 1500


def test_export_for_pylate(capsys, tiny_models, tmp_path):
    argv = ["export", tiny_models.teacher, "--format", "pylate", "--output", tmp_path / "pylate"]
    assert run_json(capsys, argv) == {"output": str(tmp_path / "pylate")}
    fails(capsys, argv, "pylate: not empty; choose another folder")
    fails(capsys, [*argv, "--passage-length", 8], "passage_length: given with --format pylate")


def test_mistyped_option_names_the_nearest(capsys):
    argv = ["search", "model", "--output", "x.run", "--queris", "q.tsv"]
    fails(capsys, argv, "unrecognized arguments: --queris q.tsv; did you mean `--queries`")


def test_training_without_a_terminal_shows_no_progress_bar(
    world, tiny_models, tmp_path, capsys, caplog
):
    argv = ["train", "distill", "--teacher", tiny_models.teacher, "--role", "document"]
    argv += ["--bitext", world / "bitext/en-sw.tsv", "--output_dir", tmp_path / "out"]
    argv += ["--max_steps", "3", "--per_device_train_batch_size", "4", "--stream", "--use_cpu"]
    assert cli.main(list(map(str, argv))) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "out" / "final")
    assert "%|" not in err and "?example" not in err
    modes = {path.stat().st_mode for path in (tmp_path / "out/final").glob("*.[js]*")}
    assert len(modes) == 1  # other users can read the weights too
    made = json.loads((tmp_path / "out" / "run.json").read_text())
    assert made["arguments"]["disable_tqdm"] is True and made["options"]["stream"] is True
    again = [*argv[:-6], "--stream", "--output_dir", tmp_path / "two"]
    fails(capsys, again, "max_steps: none given, and a stream has no end")
    fails(capsys, [*argv, "--mass", "idf"], "mass: 'idf', expected 'uniform', because stream")


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("RANK", "-1")]
)
def test_numbers_of_the_environment_are_checked(capsys, world, monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    argv = ["vectors", "m", "--bitext", str(world / "bitext/en-sw.tsv"), "--role", "query"]
    monkeypatch.setattr("optical.models.retriever.check_model", lambda name: None)
    fails(capsys, [*argv, "--output", "v"], f"{name}: '{value}' in the environment, expected a")


def test_an_empty_index_is_not_searched(capsys, world, tiny_models, tmp_path):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    (tmp_path / "none.tsv").write_text("d1\twater\n")
    base = str(tmp_path / "base")
    index = ["index", tiny_models.teacher, "--documents", str(tmp_path / "none.tsv")]
    assert cli.main([*index, "--output", base]) == 0
    LanceIndex(base).table.delete("true")
    argv = ["search", tiny_models.teacher, "--index", base, "--queries", str(world / "queries.tsv")]
    fails(
        capsys, [*argv, "--output", str(tmp_path / "o.run")], "base: the index holds no documents"
    )
