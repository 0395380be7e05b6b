"""The command line: help, output, errors and exit codes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import optical
from optical.cli import main as cli
from optical.training.options import WITHOUT_STEPS, choices_of

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    *("study", "search", "evaluate", "compare", "lexicon", "vectors", "figures", "info"),
    *("align", "export", "index"),
]
QRELS = "q1 0 d1 1\nq2 0 d2 1\nq3 0 d3 1\nq4 0 d4 1\n"


def write_run(path, ranks):
    """Write a run that ranks the relevant document of query i at ranks[i]."""
    lines = []
    for i, rank in enumerate(ranks, start=1):
        for place in range(1, 6):
            document = f"d{i}" if place == rank else f"x{place}"
            lines.append(f"q{i} Q0 {document} {place} {10 - place} tag\n")
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture
def judged(tmp_path):
    """Return the paths of judgements and of two runs, the second of which is better."""
    (tmp_path / "qrels").write_text(QRELS)
    return (
        str(tmp_path / "qrels"),
        write_run(tmp_path / "old.run", [2, 2, 4, 5]),
        write_run(tmp_path / "new.run", [1, 1, 2, 1]),
    )


def fails(capsys, argv, message):
    """Check that a command ends with exit code 2 and an error whose last line matches."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2, out + err
    assert "Traceback" not in err
    assert re.search(message, err.splitlines()[-1]), err
    return err


# --- help and exit codes -------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(" ".join(["usage: optical", *command]))
    if not command:
        assert all(name in out for name in (*COMMANDS, "train", *cli.RECIPES))
        return
    # The help ends with a valid example.
    words = shlex.split(out.split("example:\n")[1])
    assert words[:2] == ["optical", *command]
    assert cli.build_parser()[0].parse_args(words[1:]).run


def test_help_of_train(capsys):
    for argv, code in ((["train", "--help"], 0), (["train", "-h"], 0), (["train"], 2)):
        assert cli.main(argv) == code
        out = capsys.readouterr().out
        assert all(f"{name}  " in out for name in cli.RECIPES)


# Command and what it may load for the first time, in this order in one process.
LIGHT = [
    ("--help", ()),
    ("search --help", ()),
    ("train distill --help", ()),
    ("figures absent.csv --output figures", ()),
    ("report absent", ()),
    ("evaluate one.run --qrels qrels.txt", ("ir_measures",)),
    ("compare one.run two.run --qrels qrels.txt --samples 100", ()),
    ("train distill --objective absent", ("torch",)),
    ("search ./absent --queries queries.tsv --documents queries.tsv --output x.run", ()),
    ("index . --documents queries.tsv --output x --device cuda:99", ()),
    ("lexicon bitext.tsv --output lexicon.tsv", ()),
    ("study absent.yaml", ("yaml",)),
]
LOADED = """
import json, sys
from optical.cli.main import main
loaded = []
for command in json.loads(sys.argv[1]):
    try:
        main(command.split())
    except SystemExit:
        pass
    loaded.append(sorted({name.split(".")[0] for name in sys.modules}))
print("LOADED", json.dumps(loaded))
"""


def test_no_command_imports_a_library_that_it_does_not_need(tmp_path):
    pytest.importorskip("ir_measures", reason="the extra `eval` is not installed")
    pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")
    (tmp_path / "queries.tsv").write_text("q1\tfish\n")
    (tmp_path / "bitext.tsv").write_text("".join(f"fish {i}\tsamaki {i}\n" for i in range(9)))
    (tmp_path / "qrels.txt").write_text("q1 0 d1 1\n")
    for run, score in (("one", 1.0), ("two", 2.0)):
        (tmp_path / f"{run}.run").write_text(f"q1 Q0 d1 1 {score} tag\n")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, json.dumps([command for command, _ in LIGHT])],
        capture_output=True, text=True, cwd=tmp_path, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (tmp_path / "lexicon.tsv").is_file()
    heavy = {
        "transformers", "sentence_transformers", "datasets", "tokenizers", "accelerate", "scipy",
        "sklearn", "pandas", "pyarrow", "lancedb", "ir_measures", "ir_datasets", "matplotlib",
        "yaml", "triton", "torch",
    }  # fmt: skip
    before = set()
    for (command, may_load), loaded in zip(
        LIGHT, json.loads(done.stdout.split("LOADED")[1]), strict=True
    ):
        assert not (heavy & set(loaded)) - before - set(may_load), command
        before |= set(may_load)


@pytest.mark.parametrize("recipe", cli.RECIPES)
def test_help_of_a_recipe(capsys, recipe):
    pytest.importorskip("sentence_transformers")
    assert cli.main(["train", recipe, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: optical train {recipe}")
    of_steps = {"--max_steps", "--resume", "--bf16"}
    assert "--output_dir" in out.split()
    shown = set() if recipe in WITHOUT_STEPS else of_steps
    assert of_steps & set(out.split()) == shown
    # Every option has a help text.
    assert all(len(line.split()) > 1 for line in out.splitlines() if line.startswith("  --"))
    # Help texts are whole sentences, with the choices and the default.
    texts = [" ".join(text.split()) for text in out.split("\n  --")[1:]]
    texts[-1] = texts[-1].split(" --config")[0]
    assert all(text.endswith((".", ")")) and "..." not in text for text in texts), texts
    options = cli.RECIPES[recipe][0]
    for option, choices in choices_of(options).items():
        text = next(text for text in texts if text.startswith(f"{option} "))
        assert all(choice in text for choice in choices)
    assert cli.main(["train", recipe, "--help-all"]) == 0
    assert "--gradient_accumulation_steps" in capsys.readouterr().out


def test_help_of_a_recipe_states_the_defaults(capsys):
    recipes = pytest.importorskip("optical.training.recipes", reason="needs the extra `train`")
    assert cli.main(["train", "distill", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    options = text.split(" --")[1:]
    assert all("default: " in option or "Required." in option for option in options[:-2])
    args = recipes.trainer_arguments("out")
    for name in ("num_train_epochs", "learning_rate", "warmup_steps", "seed", "save_steps"):
        (shown,) = (option for option in options if option.startswith(f"{name} "))
        assert f"(default: {getattr(args, name)})" in shown
    assert "(default: all)" in text and "envelope (as OPTICAL), implicit or unroll" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"optical {optical.__version__}\n"


def test_no_command_prints_the_usage(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("usage: optical ") and "examples:" in err


def test_unknown_commands_name_the_nearest(capsys):
    fails(capsys, ["stduy"], "command 'stduy' is unknown; did you mean `study`")
    fails(capsys, ["tarin", "distill"], "command 'tarin' is unknown; did you mean `train`")
    fails(capsys, ["zzz"], "command 'zzz' is unknown; known: align, compare, .*, vectors")
    fails(capsys, ["train", "destill"], "recipe 'destill' is unknown; did you mean `distill`")


def test_invalid_options(capsys, judged):
    qrels, old, _ = judged
    fails(capsys, ["evaluate", old, "--qrels", qrels, "--measure", "AP"], "unrecognized arguments")
    fails(capsys, ["search", "model"], "required: --output")
    fails(capsys, ["compare", old, old, "--qrels", qrels, "--seed", "x"], "invalid int value: 'x'")
    fails(capsys, ["--verison"], "unrecognized arguments: --verison; did you mean `--version`")


def test_interruption_has_exit_code_130(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    messages = {
        "info": "nothing was written",
        "study": "continues where it stopped",
        "train": "--resume",
        "index m --documents d --output o": "continues where it stopped",
        "export m --format tokens --output o": "continues where it stopped",
        "export m --format pylate --output o": "nothing was written",
    }
    for command, message in messages.items():
        name = command.split()[0]
        owner = cli.indexing if name == "index" else cli.models if name == "export" else cli
        monkeypatch.setattr(owner, name, interrupt)
        assert cli.main(command.split()) == 130
        assert message in capsys.readouterr().err


class LanceError(RuntimeError):
    __module__ = "lancedb.errors"


class SafetensorError(Exception):
    __module__ = "safetensors_rust"


class ConnectError(Exception):
    __module__ = "httpx"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LanceError("LanceError(IO): No space left on device"), "no room to write (LanceError(IO)"),
        (RuntimeError("lance error: LanceError(IO): access denied"), "the vector database failed"),
        (SafetensorError("I/O error: No space left on device"), "no room to write (I/O error"),
        (SafetensorError("header too large"), "a file of a model cannot be read or written"),
        (ConnectError("[Errno 111]"), "the network failed ([Errno 111]); try again"),
        (MemoryError(), "memory ran out (MemoryError); use a smaller batch size"),
        (
            RuntimeError("CUDA out of memory. Tried\nto"),
            "memory ran out (CUDA out of memory. Tried)",
        ),
        (RuntimeError("X requires tensorboard to be installed"), "requires tensorboard"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeEncodeError("ascii", "maji\u20ac", 4, 5, "no"), "set PYTHONUTF8=1"),
        (OverflowError("int too big to convert"), "a number is too large (int too big"),
        (RuntimeError("value cannot be converted without overflow"), "a number is too large"),
        (ValueError("first\n  second"), "optical: error: first"),
        (OSError(), "optical: error: OSError"),
    ],
)
def test_foreign_errors_become_one_line(capsys, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli, "info", fail)
    assert cli.main(["info"]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1 and err.startswith("optical: error: ")


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "info", fail)
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_info(capsys):
    assert cli.main(["info", "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert f"optical {optical.__version__}" in out and "torch" in out
    assert all(name in out for name in ("reference", "triton"))
    assert "self-test" not in out


# The start of the console script, which an environment without an installation lacks.
INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n"
SCRIPT = ["-c", "import sys; from optical.cli.__main__ import run; sys.exit(run())"]


@pytest.mark.parametrize("entry", [["-m", "optical"], ["-m", "optical.cli"], SCRIPT])
def test_an_interrupt_during_any_import_is_one_line(tmp_path, entry):
    """Packages that send themselves the signal while they are imported stand for a Ctrl-C then."""
    (tmp_path / "torch.py").write_text(INTERRUPT)
    # As extension modules do that are interrupted.
    (tmp_path / "ir_measures.py").write_text(
        f"try:\n    {INTERRUPT}except KeyboardInterrupt:\n    raise ImportError('it failed')\n"
    )
    early = tmp_path / "early"  # `argparse` imports this one
    early.mkdir()
    (early / "gettext.py").write_text(INTERRUPT)
    for name in ("one", "two"):
        (tmp_path / f"{name}.run").write_text("q1 Q0 d1 1 1.0 tag\n")
    (tmp_path / "qrels.txt").write_text("q1 0 d1 1\n")
    search = "search . --queries qrels.txt --documents qrels.txt --output x.run"
    for folder, command, said in (
        (early, "--help", ""),
        (tmp_path, "evaluate one.run --qrels qrels.txt", ""),
        (tmp_path, f"{search} --device cpu", ""),
        (tmp_path, search, "reading the queries and documents\n"),
    ):
        done = subprocess.run(
            [sys.executable, *entry, *command.split()],
            cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        )  # fmt: skip
        told = (done.returncode, done.stdout, done.stderr)
        assert told == (130, "", f"{said}interrupted; nothing was written\n"), command


def test_background_jobs_ignore_interrupts_as_their_shell_tells_them(tmp_path):
    (tmp_path / "gettext.py").write_text(INTERRUPT)
    done = subprocess.run(
        [sys.executable, "-m", "optical", "--version"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    # The replaced module lacks what argparse needs, which is where the command ends.
    assert done.returncode == 1 and "interrupted" not in done.stderr


def test_command_line_runs_as_a_module():
    command = [sys.executable, "-m", "optical.cli", "evaluate", "no.run", "--qrels", "no.qrels"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "optical: error: no.run: no such file\n"


# --- evaluate and compare ------------------------------------------------------------------------


def test_identical_ids_are_left_out(capsys, tmp_path):
    """In ArguAna, a query is a document of the collection and would be its own best result."""
    pytest.importorskip("ir_measures")
    (tmp_path / "qrels").write_text("q1 0 d1 1\n")
    for name, best in (("own", "q1"), ("other", "d2")):
        (tmp_path / name).write_text(f"q1 Q0 {best} 1 3.0 tag\nq1 Q0 d1 2 2.0 tag\n")
    words = ["--qrels", str(tmp_path / "qrels"), "--measures", "AP", "--json"]
    found = []
    for more in ([], ["--ignore-identical-ids"]):
        assert cli.main(["evaluate", str(tmp_path / "own"), *words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["mean"]["AP"])
        runs = [str(tmp_path / name) for name in ("other", "own")]
        assert cli.main(["compare", *runs, *words, *more, "--samples", "10"]) == 0
        (one,) = json.loads(capsys.readouterr().out)["rows"]
        found.append(one["difference"])
    assert found == pytest.approx([0.5, 0.0, 1.0, 0.5])


def test_evaluate(capsys, judged):
    pytest.importorskip("ir_measures")
    qrels, old, new = judged
    assert cli.main(["evaluate", old, "--qrels", qrels, "--measures", "AP RR@10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = (1 / 2 + 1 / 2 + 1 / 4 + 1 / 5) / 4
    assert found["mean"] == pytest.approx({"AP": expected, "RR@10": expected})
    assert "per_query" not in found
    argv = ["evaluate", new, "--qrels", qrels, "--measures", "AP", "--per-query"]
    assert cli.main([*argv, "--json"]) == 0
    per_query = json.loads(capsys.readouterr().out)["per_query"]
    assert per_query["AP"] == {"q1": 1.0, "q2": 1.0, "q3": 0.5, "q4": 1.0}
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "q3\t0.5000" in out and "| AP | 0.8750 |" in out


def test_compare(capsys, judged):
    pytest.importorskip("ir_measures")
    qrels, old, new = judged
    argv = ["compare", old, new, "--qrels", qrels, "--measures", "AP", "--samples", "500"]
    assert cli.main([*argv, "--json"]) == 0
    first = capsys.readouterr().out
    text = json.dumps(json.loads(first))
    assert "AP" in text and "new.run" in text
    assert cli.main([*argv, "--json"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("|") > 8 and "new.run" in out
    assert cli.main([*argv, "--baseline", new, "--test", "t", "--correction", "none"]) == 0


def test_invalid_runs_and_judgements(capsys, judged, tmp_path):
    pytest.importorskip("ir_measures")
    qrels, old, new = judged
    bad = tmp_path / "bad.run"
    bad.write_text("q1 Q0 d1 1 0.5 tag\nq1 Q0 d2 2\n")
    fails(capsys, ["evaluate", str(bad), "--qrels", qrels], r"^optical: error: .*bad\.run:2: ")
    fails(capsys, ["evaluate", old, "--qrels", qrels, "--measures", "AB"], "'AB'")
    fails(capsys, ["evaluate", old, "--qrels", "nowhere"], "nowhere")
    fails(capsys, ["compare", old, "--qrels", qrels], "runs: one given, expected at least two")
    fails(capsys, ["compare", old, old, "--qrels", qrels], "runs: one given, expected at least two")
    argv = ["compare", old, new, "--qrels", qrels]
    fails(capsys, [*argv, "--baseline", "other"], "baseline: 'other', expected one of the runs")


# --- search --------------------------------------------------------------------------------------


def test_search_and_evaluate(capsys, world, tiny_models, tmp_path):
    run = tmp_path / "runs/sw.run.gz"
    argv = ["search", tiny_models.teacher, "--queries", str(world / "queries.tsv")]
    argv += ["--documents", str(world / "documents/en.jsonl"), "--output", str(run)]
    assert cli.main([*argv, "--depth", "7"]) == 0
    assert re.search(r"sw\.run\.gz: \d+ queries, 48 documents searched", capsys.readouterr().out)
    assert cli.main(["evaluate", str(run), "--qrels", str(world / "qrels.txt"), "--json"]) == 0
    means = json.loads(capsys.readouterr().out)["mean"]
    assert means["R@10"] == means["R@100"] > 0.3  # English to English is easy
    from optical.data.trec import read_run

    assert {len(documents) for documents in read_run(run).values()} == {7}
    # Another model for the documents.
    argv = [*argv, "--document-model", tiny_models.teacher, "--tag", "mine", "--depth", "7"]
    argv[argv.index(str(run))] = str(tmp_path / "two.run")
    assert cli.main(argv) == 0
    first = (tmp_path / "two.run").read_text().split("\n")[0].split()
    assert len(first) == 6 and first[-1] == "mine"
    assert read_run(tmp_path / "two.run").keys() == read_run(run).keys()


def test_search_names_missing_inputs(capsys, world, tmp_path):
    pytest.importorskip("sentence_transformers")
    files = ["--queries", str(world / "queries.tsv")]
    out = ["--output", str(tmp_path / "a.run")]
    fails(capsys, ["search", "./m", *files, *out], "--collection, or --queries with --documents")
    files += ["--documents", str(world / "documents/sw.jsonl")]
    fails(capsys, ["search", "./m", *files, *out], r"model \./m: no such folder; train it first")
    (tmp_path / "file").touch()
    argv = ["search", "./m", *files, "--output", str(tmp_path / "file" / "a.run")]
    fails(capsys, argv, "output folder .* cannot be written .*; choose another one")
    files[1] = "no.tsv"
    fails(capsys, ["search", "./m", *files, *out], r"no\.tsv: no such file")


# --- train ---------------------------------------------------------------------------------------


def test_train_with_a_configuration(capsys, world, tiny_models, tmp_path):
    pytest.importorskip("yaml")
    config = tmp_path / "sw.yaml"
    config.write_text(
        f"teacher: {tiny_models.teacher}\nstudent: {tiny_models.wide}\nrole: document\n"
        f"bitext: [{world / 'bitext/en-sw.tsv'}, {world / 'bitext/en-de.tsv'}]\n"
        "max_steps: 50\nlearning_rate: 1e-2\nper_device_train_batch_size: 8\n"
        "learning_rate_mapping: {'.*tok_embeddings': 1.0e-2}\ndisable_tqdm: true\n"
    )
    out = tmp_path / "out"
    argv = ["train", "distill", "--config", str(config), "--output_dir", str(out)]
    # The command line overrides the file.
    assert cli.main([*argv, "--max_steps", "2", "--max_iter=7"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "final")
    run = json.loads((out / "run.json").read_text())
    assert run["arguments"]["max_steps"] == 2 and run["arguments"]["learning_rate"] == 0.01
    assert run["arguments"]["per_device_train_batch_size"] == 8
    assert run["arguments"]["learning_rate_mapping"] == {".*tok_embeddings": 0.01}
    assert run["arguments"]["report_to"] == []
    assert run["options"]["max_iter"] == 7 and len(run["options"]["bitext"]) == 2

    fails(capsys, [*argv, "--max_steps", "2"], "holds checkpoints; add --resume to continue")
    assert cli.main([*argv, "--max_steps", "3", "--max_iter=7", "--resume"]) == 0
    state = json.loads((out / "checkpoint-3/trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_train_encoder(capsys, world, tmp_path):
    pytest.importorskip("sentence_transformers")
    argv = ["train", "encoder", "--text", str(world / "text/en.txt"), str(world / "text/sw.txt")]
    argv += ["--hidden_size", "16", "--layers", "1", "--vocabulary_size", "100", "--max_steps", "1"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]) == 0
    from transformers import AutoModel

    folder = capsys.readouterr().out.splitlines()[-1]
    assert AutoModel.from_pretrained(folder).config.hidden_size == 16


@pytest.mark.parametrize(
    ("recipe", "argv", "options", "arguments"),
    [
        (
            "distill",
            "--teacher t --bitext a b --role query --epsilon 0.2 --bf16 --use_cpu --seed 7",
            {"teacher": "t", "bitext": ["a", "b"], "role": "query", "epsilon": 0.2},
            {"bf16": True, "seed": 7, "output_dir": "{tmp}", "save_total_limit": 1},
        ),
        (
            "distill",
            "--teacher t --bitext a --role query --gradient_accumulation_steps 4 --bf16 false",
            {"max_pairs": None},
            {"gradient_accumulation_steps": 4, "bf16": False, "learning_rate": 2e-5},
        ),
        (
            "teacher",
            "--model m --pairs a --dimension 8 --query_expansion --learning_rate 3e-4",
            {"model": "m", "pairs": ["a"], "dimension": 8, "query_expansion": True},
            {"learning_rate": 3e-4, "per_device_train_batch_size": 64},
        ),
        (
            "codeswitch",
            "--model m --pairs a --lexicon sw=x de=y --probability 0.25 --role both",
            {"lexicon": ["sw=x", "de=y"], "probability": 0.25, "role": "both", "copies": 1},
            {},
        ),
    ],
)
def test_options_reach_the_recipe(capsys, monkeypatch, tmp_path, recipe, argv, options, arguments):
    training = pytest.importorskip("optical.training.recipes")
    seen = {}

    def make(found, args):
        seen.update(options=vars(found), arguments=vars(args))
        raise ValueError("enough")

    monkeypatch.setattr(training, recipe, make)
    monkeypatch.chdir(tmp_path)
    for name in "abxy":
        (tmp_path / name).write_text("water\tmaji\n")
    fails(capsys, ["train", recipe, *argv.split(), "--output_dir", str(tmp_path)], "enough")
    for name, value in options.items():
        assert seen["options"][name] == value, name
    for name, value in arguments.items():
        assert seen["arguments"][name] == (str(tmp_path) if value == "{tmp}" else value), name


def test_errors_of_train(capsys, world, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    out = ["--output_dir", "out"]
    usual = ["--teacher", "./t", "--bitext", str(world / "bitext/en-sw.tsv"), "--role", "query"]
    distill = ["train", "distill"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t/config.json").write_text("{}")
    fails(capsys, [*distill, *usual], "output_dir: none given; expected a folder to write to")
    fails(capsys, [*distill, *usual, *out, "--epsilo", "1"], "unknown option --epsilo; did you mea")
    error = fails(
        capsys, [*distill, *usual, *out, "--epsilon", "x"], "--epsilon: invalid float value"
    )
    assert len(error.splitlines()) == 1
    fails(capsys, [*distill, *usual, *out, "--bf16", "x"], "--bf16: Truthy value expected: got x")
    fails(capsys, [*distill, *usual, *out, "--epsilon", "-1"], "epsilon is -1.0; expected a finite")
    fails(capsys, [*distill, *out], "teacher: none given; expected a Hugging Face name or a folder")
    missing = [*distill, *usual, *out, "--student", "./u"]
    fails(capsys, missing, r"model \./u: no such folder")
    services = [*distill, *usual, *out, "--report_to", "clearml"]
    fails(capsys, services, "report_to: clearml needs the package clearml: pip install clearml")
    fails(capsys, [*distill, *usual, *out, "--device", "cuda:99"], "device: cuda:99, but PyTorch")
    fails(capsys, [*distill, *usual, *out, "--patience", "2"], "patience: given without validation")
    (tmp_path / "empty.tsv").touch()
    argv = [*distill, *usual, "--bitext", "empty.tsv", *out]
    fails(capsys, argv, r"empty\.tsv: no sentence pair in 0 lines")
    (tmp_path / "file").touch()
    for folder in ("file", "file/deeper"):
        argv = [*distill, *usual, "--output_dir", folder]
        fails(capsys, argv, f"output folder {folder} cannot be written .*; choose another one")


@pytest.mark.parametrize(
    ("settings", "words", "told"),
    [
        ("device: cpu\njson: true\n", [], {"use_cpu": True, "json": True}),
        ("device: cpu\njson: yes\n", ["--json", "false"], {"use_cpu": True, "json": False}),
        ("device: cuda:99\n", ["--device", "cpu"], {"use_cpu": True, "json": False}),
        ("device:\njson:\nmax_pairs:\n", [], {"use_cpu": False, "json": False}),
        ("device: cuda:99\n", [], "device: cuda:99, but PyTorch finds 0 CUDA devices here"),
        ("device: gpu\n", [], "device: 'gpu', expected a name such as cpu, cuda or cuda:1"),
        ("json: maybe\n", [], r"c\.yaml: --json: .*got maybe but expected one of yes/no"),
    ],
)
def test_a_configuration_holds_the_options_of_the_command(
    capsys, monkeypatch, tmp_path, settings, words, told
):
    import torch

    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").write_text("water\tmaji\n")
    (tmp_path / "c.yaml").write_text("teacher: t\nbitext: b\nrole: query\n" + settings)
    seen = []
    monkeypatch.setattr(
        "optical.cli.train._train", lambda recipe, options, kind, values: seen.append(values) or "o"
    )
    argv = ["train", "distill", "--config", "c.yaml", "--output_dir", "o", *words]
    if isinstance(told, str):
        fails(capsys, argv, told)
        return
    assert cli.main(argv) == 0
    assert seen[0]["use_cpu"] == told["use_cpu"] and seen[0]["max_pairs"] is None
    assert capsys.readouterr().out == ('{"output": "o"}\n' if told["json"] else "o\n")


def test_invalid_configurations_of_train(capsys, tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    argv = ["train", "distill", "--config", "c.yaml", "--output_dir", "out"]
    fails(capsys, argv, r"c\.yaml: no such configuration file")
    for data, message in (
        (b"epsilom: 1\n", r"c\.yaml: unknown key `epsilom`; did you mean `epsilon`"),
        (b"a: [b\n", r"c\.yaml:\d: not YAML"),
        (b"- a\n", r"c\.yaml: expected keys and values, found list"),
        (b"\xff\n", r"c\.yaml:1: not UTF-8"),
        (b"epsilon: small\n", r"c\.yaml: --epsilon: invalid float value: 'small'"),
        (b"epsilon: [0.1, 0.2]\n", r"c\.yaml: epsilon: \[0.1, 0.2\], expected one value"),
        (b"optim: [sgd, sgd]\n", r"c\.yaml: optim: \['sgd', 'sgd'\], expected one value"),
        (b"epsilon: 1\nepsilon: 2\n", r"c\.yaml:2: key `epsilon` appears a second time"),
        (b"learning_rate: fast\n", r"c\.yaml: --learning_rate: invalid float value: 'fast'"),
        (b"lr_scheduler_type: fast\n", r"c\.yaml: --lr_scheduler_type: invalid choice: 'fast'"),
    ):
        (tmp_path / "c.yaml").write_bytes(data)
        fails(capsys, argv, message)


# --- study ---------------------------------------------------------------------------------------


def test_errors_of_study(capsys, tmp_path):
    pytest.importorskip("yaml")
    pytest.importorskip("sentence_transformers")
    fails(capsys, ["study", "no.yaml"], r"no\.yaml: no such configuration file")
    (tmp_path / "c.yaml").write_text("languagez: [sw]\n")
    fails(capsys, ["study", str(tmp_path / "c.yaml")], "unknown key `languagez` in the study; did")
    (tmp_path / "out").touch()
    argv = ["study", "--output", str(tmp_path / "out")]
    fails(capsys, argv, "output folder .* cannot be written .*; choose another one")


# --- lexicons, stored vectors and figures --------------------------------------------------------


def test_lexicon_command(capsys, world, tmp_path):
    from optical.data.lexicon import read_lexicon

    argv = ["lexicon", str(world / "bitext/en-sw.tsv"), "--output", str(tmp_path / "sw.tsv")]
    assert cli.main(argv) == 0
    lexicon = read_lexicon(tmp_path / "sw.tsv")
    assert lexicon["bread"][0] == "mkate"
    entries = sum(map(len, lexicon.values()))
    assert f"sw.tsv: {entries} entries, 96 pairs" in capsys.readouterr().out
    fails(capsys, ["lexicon", "no.tsv", "--output", str(tmp_path / "x")], r"no\.tsv: no such file")


def test_vectors_command(capsys, world, tiny_models, tmp_path):
    from optical.models.token_store import StoredVectors

    bitext = str(world / "bitext/en-sw.tsv")
    shared = ["vectors", tiny_models.teacher, "--bitext", bitext, "--output", str(tmp_path / "v")]
    assert cli.main([*shared, "--role", "document", "--max-length", "9"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "v")
    assert len(StoredVectors([tmp_path / "v"], role="document", max_length=9)) == 96
    fails(capsys, [*shared, "--role", "passage"], "--role: invalid choice: 'passage'")


def test_figures_refuses_other_tables(capsys, tmp_path):
    argv = ["figures", str(tmp_path / "no.csv"), "--output", str(tmp_path)]
    fails(capsys, argv, r"no\.csv: no such file")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    argv = ["figures", str(tmp_path / "other.csv"), "--output", str(tmp_path)]
    fails(capsys, argv, r"other\.csv:1: columns \['a', 'b'\], expected kind, collection")


# --- errors that need no imports and no reading --------------------------------------------------


def run_guarded(argv, *, missing=()):
    """Run a command in a process that reads no run and imports no heavy package.

    Args:
        argv: arguments of the command.
        missing: packages that cannot be imported, as if they were not installed.

    Returns:
        The exit code and the standard error.
    """
    code = f"""
        import importlib.abc, sys

        class Missing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] in {missing!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Missing())
        from optical.cli import main
        from optical.data import trec

        def read(path):
            sys.exit(f"{{path}} was read")

        trec.read_run = trec.read_qrels = read
        try:
            code = main.main({argv!r})
        except SystemExit as stop:
            code = stop.code
        heavy = {{"transformers", "sentence_transformers", "datasets", "ir_measures", "matplotlib"}}
        imported = heavy & {{name.split(".")[0] for name in sys.modules}}
        sys.exit(f"{{imported}} were imported" if imported else code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    return done.returncode, done.stderr


COMPARE = ["compare", "a.run", "b.run", "--qrels", "q"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*COMPARE, "--test", "foo"], "argument --test: invalid choice: 'foo'"),
        ([*COMPARE, "--correction", "foo"], "argument --correction: invalid choice: 'foo'"),
        ([*COMPARE, "--baseline", "c.run"], "baseline: 'c.run', expected one of the runs"),
        (
            ["vectors", "m", "--bitext", "b", "--output", "o", "--role", "passage"],
            "argument --role: invalid choice: 'passage'",
        ),
        (
            ["align", "m", "--bitext", "b", "--output", "o", "--role", "passage"],
            "argument --role: invalid choice: 'passage'",
        ),
        (
            ["align", "m", "--bitext", "b", "--output", "o", "--format", "giza"],
            "argument --format: invalid choice: 'giza'",
        ),
        (
            ["export", "m", "--output", "o", "--format", "vectors"],
            "argument --format: invalid choice: 'vectors'",
        ),
        (
            ["train", "distill", "--teacher", "t", "--role", "passage"],
            "--role: invalid choice: 'passage'",
        ),
        (
            ["train", "distill", "--teacher", "t", "--gradient", "none"],
            "--gradient: invalid choice: 'none'",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_invalid_choices_are_refused_before_imports(argv, message):
    code, err = run_guarded(argv)
    assert code == 2 and message in err.splitlines()[-1], err


@pytest.mark.parametrize(
    ("argv", "package", "extra"),
    [
        (["evaluate", "a.run", "--qrels", "q"], "ir_measures", "eval"),
        (COMPARE, "ir_measures", "eval"),
        ([*COMPARE, "--test", "t"], "scipy", "eval"),
        (["search", "m", "--output", "o", "--collection", "c"], "sentence_transformers", "train"),
        (["index", "m", "--output", "o", "--collection", "c"], "lancedb", "index"),
        (["train", "distill", "--role", "query"], "sentence_transformers", "train"),
        (["export", "m", "--format", "pylate", "--output", "o"], "sentence_transformers", "train"),
        (["figures", "r.csv", "--output", "o"], "matplotlib", "study"),
        (["study"], "matplotlib", "study"),
        (["study"], "sentence_transformers", "study"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_missing_packages_are_named_with_their_extra(argv, package, extra):
    code, err = run_guarded(argv, missing=(package,))
    last = err.splitlines()[-1]
    assert code == 2, err
    assert f'needs {package}; install it with `pip install "optical-ot[{extra}]"`' in last


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "a", "b", "--qrels", "q", "--test", "foo"], "argument --test: invalid choice"),
        (["search"], "the following arguments are required: model, --output"),
        (["search", "m", "--output", "o", "--depht", "3"], "unrecognized arguments: --depht"),
    ],
)
def test_errors_of_the_parser_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith(f"optical {argv[0]}: error: {message}") and err.count("\n") == 1
