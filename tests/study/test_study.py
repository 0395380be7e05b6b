"""A miniature study: its report, resuming after interruptions, and invalidation by changes."""

import copy
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="needs the extra `study`")
pytest.importorskip("sentence_transformers", reason="needs the extra `study`")
pytest.importorskip("ir_measures", reason="needs the extra `study`")
pytest.importorskip("matplotlib", reason="needs the extra `study`")

import yaml
from transformers import TrainerCallback

from optical.cli import main as cli
from optical.report.table import LOSS_COLUMNS, read_rows
from optical.study import evaluation_tasks, tasks
from optical.study.config import read_config
from optical.study.layout import Fingerprints
from optical.study.study import Study, run_study
from optical.study.tasks import Costs, Progress, Task
from optical.training import runner
from optical.training.options import CodeswitchOptions, DistillOptions, TransferOptions

FIGURES = (
    *("measure_per_language.png", "gap_per_arm.png", "queries.png", "losses.png"),
    "alignment.png",
)


def configuration(world):
    """Return a configuration of 17 tasks with a few training steps each."""
    return {
        "title": "A miniature <study>",
        "note": "Dogs & cats.",
        "languages": ["sw", "de"],
        "low": ["sw"],
        "high": ["de"],
        "names": {"sw": "Swahili"},
        "measures": ["AP", "R@10"],
        "arguments": {
            "learning_rate": 0.01,
            "per_device_train_batch_size": 8,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "encoder": {
            "text": [str(world / f"text/{language}.txt") for language in ("en", "sw", "de")],
            "vocabulary_size": 200,
            "hidden_size": 16,
            "layers": 1,
            "max_tokens": 24,
            "arguments": {"max_steps": 2, "per_device_train_batch_size": 8},
        },
        "teacher": {
            "pairs": str(world / "teacher.tsv"),
            "document_length": 24,
            "arguments": {"max_steps": 12},
        },
        "arms": {
            "zeroshot": {"recipe": "none"},
            "ot": {
                "recipe": "distill",
                "bitext": str(world / "bitext/en-{language}.tsv"),
                "max_iter": 10,
                "arguments": {"max_steps": 5},
            },
            "switched": {
                "recipe": "codeswitch",
                "lexicon": str(world / "lexicon/en-{language}.tsv"),
                "arguments": {"max_steps": 3},
            },
        },
        "collections": {
            "tiny": {
                "queries": str(world / "queries.tsv"),
                "documents": str(world / "documents/{language}.jsonl"),
                "qrels": str(world / "qrels.txt"),
            }
        },
        "alignment": {
            "language": "sw",
            "english": "the teacher buys the bread",
            "other": "mwalimu ananunua mkate",
        },
    }


def write(folder, raw):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Run the study without interruption; return its configuration and output folder."""
    folder = tmp_path_factory.mktemp("study")
    config = write(folder, configuration(world))
    assert run_study(config, folder / "out") == folder / "out/report.md"
    return config, folder / "out"


def numbers(folder):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


# --- the report ----------------------------------------------------------------------------------


def test_report_contains_all_statistics(finished):
    _, out = finished
    found = numbers(out)
    assert found["measure"] == "AP"
    arms = ["zeroshot", "ot", "switched"]
    cells = {(row["arm"], row["language"], row["measure"]) for row in found["means"]}
    expected = {(a, x, m) for a in arms for x in ("sw", "de") for m in ("AP", "R@10")}
    assert cells == expected | {(tasks.CEILING, "en", measure) for measure in ("AP", "R@10")}
    assert all(0 <= row["mean"] <= 1 for row in found["means"])
    assert all(row["low"] <= row["high"] for row in found["intervals"])
    pairs = [(row["language"], row["arm"], row["against"]) for row in found["comparisons"]]
    assert len(pairs) == len(set(pairs)) == 6
    assert all(0 < row["p"] <= row["p_holm"] <= 1 for row in found["comparisons"])
    assert [row["arm"] for row in found["gaps"]] == arms

    means = {(r["arm"], r["language"]): r["mean"] for r in found["means"] if r["measure"] == "AP"}
    for row in found["comparisons"]:
        language = row["language"]
        difference = means[row["arm"], language] - means[row["against"], language]
        assert row["difference"] == pytest.approx(difference)

    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# A miniature <study>\n\nDogs & cats.")
    for (arm, language), mean in means.items():
        assert f"{mean:.3f}" in text and arm in text and (language == "en" or language in text)
    assert "Swahili" in text and "MAP" in text and "Holm" in text
    assert "max_iter: 10" in text and "torch" in text
    for figure in FIGURES:
        assert f"](figures/{figure})" in text


def test_report_knows_starts_and_the_aligned_pairs_that_arms_learnt_from(world, tmp_path):
    raw = configuration(world)
    raw["arms"] |= {
        "more": {**raw["arms"]["ot"], "start": "ot", "max_pairs": 20},
        "fresh": {**raw["arms"]["ot"], "start": "encoder"},
        "other": {**raw["arms"]["switched"], "model": "elsewhere"},
        "translated": {"recipe": "none", "translate": {"queries": str(world / "lexicon")}},
    }
    raw["word_alignment"] = {
        "bitext": str(world / "bitext/en-{language}.tsv"),
        "lexicon": str(world / "lexicon/en-{language}.tsv"),
        "max_pairs": 30,
    }
    found = Study(read_config(write(tmp_path, raw), tmp_path / "out"))
    starts = {"ot": ("zeroshot",), "switched": ("zeroshot",), "more": ("ot",)}
    assert found._starts() == starts
    assert found._trained_alignment_pairs() == {"sw": (30, 30), "de": (30, 30)}
    # Only the first pairs are read by an arm with a limit.
    for name in ("ot", "fresh"):
        del raw["arms"][name]["bitext"]
        raw["arms"][name]["bitext"] = str(world / "bitext/en-sw.tsv")
    raw["arms"]["more"]["start"] = "teacher"
    found = Study(read_config(write(tmp_path, raw), tmp_path / "out"))
    assert found._trained_alignment_pairs() == {"sw": (30, 30), "de": (20, 30)}


def test_html_page_has_no_external_files(finished):
    _, out = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>A miniature &lt;study&gt;</h1>" in page and "Dogs &amp; cats." in page
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    for tag in ("table", "figure", "ul", "div", "pre", "thead", "tbody"):
        assert page.count(f"<{tag}") == page.count(f"</{tag}>")


def test_figures_are_not_empty(finished):
    from matplotlib.image import imread

    for name in FIGURES:
        path = finished[1] / "figures" / name
        pixels = imread(path)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.02


def test_runs_and_records_are_stored(finished, world):
    from optical.data.trec import read_run

    _, out = finished
    runs = sorted((out / "runs").glob("tiny.*.run.gz"))
    assert len(runs) == 7
    queries = {line.split("\t")[0] for line in (world / "queries.tsv").read_text().splitlines()}
    assert all(read_run(path).keys() == queries for path in runs)
    tags = {gzip.decompress(path.read_bytes()).split()[5].decode() for path in runs}
    arms = [f"{arm}-{x}-seed0" for arm in ("zeroshot", "ot", "switched") for x in ("sw", "de")]
    assert tags == {*arms, "english_documents-en-seed0"}
    records = sorted((out / "models").glob("*/run.json"))
    assert len(records) == 6
    recipes = {json.loads(path.read_text())["recipe"] for path in records}
    assert recipes == {"encoder", "teacher", "distill", "codeswitch"}
    # Checkpoints of finished trainings are deleted.
    assert not list((out / "models").glob("*/checkpoint-*"))
    (row,) = [json.loads(path.read_text()) for path in (out / "results").glob("alignment-*")]
    total = sum(sum(masses) for masses in row["plan"])
    assert total == pytest.approx(1, abs=1e-3) and row["language"] == "sw"
    assert len(row["plan"]) == len(row["other_tokens"])
    assert not list(out.rglob(".*"))


def test_report_names_the_data_and_the_machine(finished, world):
    _, out = finished
    text = (out / "report.md").read_text(encoding="utf-8")
    for path in (world / "bitext/en-sw.tsv", world / "qrels.txt", world / "documents/en.jsonl"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        assert f"| {path} | {digest} |" in text
    assert "threads of PyTorch" in text and "Processor: " in text
    documents = len((world / "documents/sw.jsonl").read_text().splitlines())
    queries = len((world / "queries.tsv").read_text().splitlines())
    assert f"| tiny | Swahili | {queries} | {documents} | " in text
    pairs = len((world / "bitext/en-sw.tsv").read_text().splitlines())
    assert f"| Swahili | {pairs} |" in text


def test_losses_of_every_training_are_drawn(finished):
    rows = read_rows(finished[1] / "losses.csv", LOSS_COLUMNS)
    assert {row["arm"] for row in rows} == {"teacher", "ot", "switched"}
    of_arm = [row for row in rows if row["arm"] == "ot" and row["language"] == "sw"]
    assert [row["step"] for row in of_arm] == [1, 2, 3, 4, 5]
    assert all(row["loss"] > 0 for row in of_arm)


def test_an_unfinished_study_is_reported(finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished[1], out)
    for path in out.glob("results/switched-*"):
        path.unlink()
    next(out.glob("results/ot-de-*")).unlink()
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.md'}\n"
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "**This study is not finished:** 3 tasks are left." in text
    assert "lacks 3 evaluations (ot 1, switched 2)" in text
    found = numbers(out)
    assert [row["arm"] for row in found["gaps"]] == ["zeroshot"]
    assert {(row["arm"], row["language"]) for row in found["comparisons"]} == {("ot", "sw")}
    row = next(line for line in text.splitlines() if line.startswith("| de | high"))
    assert row.endswith("| – |")
    for path in out.glob("results/*"):
        path.unlink()
    assert cli.main(["report", str(out)]) == 2
    assert "no arm has been evaluated" in capsys.readouterr().err
    assert cli.main(["report", str(out / "runs")]) == 2
    assert "no study.json in this folder" in capsys.readouterr().err


# --- resuming and invalidation -------------------------------------------------------------------


def never(*args, **kwargs):
    raise AssertionError("a finished task ran again")


def test_second_run_repeats_no_task(finished, monkeypatch, caplog):
    config, out = finished
    before = numbers(out)
    files = {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")}
    monkeypatch.setattr(runner, "run", never)
    monkeypatch.setattr("optical.retrieval.exact_search.search", never)
    monkeypatch.setattr("optical.models.word_alignment.align_tokens", never)
    with caplog.at_level(logging.INFO, "optical"):
        run_study(config, out)
    assert "17 tasks, 17 finished before" in caplog.text
    assert numbers(out) == before
    assert {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")} == files


def unfinished(config, out):
    """Return the labels of the tasks that a run would perform."""
    return [task.label for task in Study(read_config(config, out)).tasks() if not task.done]


def every(*patterns):
    return lambda label: any(re.fullmatch(pattern, label) for pattern in patterns)


CHANGES = {
    "title": ({"title": "Another", "note": "", "names": {}, "low": ["de"], "high": []}, every()),
    "save_steps": ({"arguments.save_steps": 4}, every()),
    "an option of one arm": (
        {"arms.ot.epsilon": 0.2},
        every("train ot .*", "evaluate ot .*", "alignment"),
    ),
    "arguments of one arm": (
        {"arms.switched.arguments.max_steps": 4},
        every("train switched .*", "evaluate switched .*"),
    ),
    "who encodes": ({"arms.ot.encodes": "both"}, every("evaluate ot .*")),
    "the teacher": ({"teacher.scale": 2.0}, lambda label: label != "train encoder"),
    "the encoder": ({"encoder.arguments.max_steps": 3}, lambda label: True),
    "common arguments": ({"arguments.learning_rate": 0.02}, lambda label: label != "train encoder"),
    "measures": ({"measures": ["AP"]}, every("evaluate .*")),
    "the sentence": ({"alignment.other": "mama anauza taa"}, every("alignment")),
    "a new arm": (
        {"arms.more": {"recipe": "distill", "bitext": "{world}/bitext/en-{language}.tsv"}},
        every("train more .*", "evaluate more .*"),
    ),
    "a seed": ({"seeds": [0, 1]}, every(".* seed 1")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_repeats_exactly_the_dependent_tasks(finished, world, tmp_path, change):
    config, out = finished
    changes, depends = CHANGES[change]
    raw = yaml.safe_load(config.read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = raw
        for name in parents:
            place = place[name]
        if isinstance(value, dict):
            value = json.loads(json.dumps(value).replace("{world}", str(world)))
        place[last] = value
    path = write(tmp_path, raw)
    expected = [t.label for t in Study(read_config(path, out)).tasks() if depends(t.label)]
    assert unfinished(path, out) == expected
    assert change in ("title", "save_steps") or expected


def test_changed_files_repeat_the_tasks_that_read_them(finished, tmp_path):
    config, out = finished
    raw = yaml.safe_load(config.read_text())
    for name, place, key in (
        ("en-sw.tsv", raw["arms"]["ot"], "bitext"),
        ("de.jsonl", raw["collections"]["tiny"], "documents"),
    ):
        folder = tmp_path / key
        shutil.copytree(Path(place[key]).parent, folder)
        place[key] = f"{folder}/{Path(place[key]).name}"
        # Equal contents in another folder are the same inputs.
        path = write(tmp_path, raw)
        assert unfinished(path, out) == []
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("maji", "mvua").replace("Wasser", "Regen"))
        found = unfinished(path, out)
        (folder / name).write_text(text)
        if key == "bitext":
            trained = ["train ot sw seed 0", "evaluate ot sw seed 0"]
            assert found == [*trained, "tokens sw", "alignment"]
        else:
            searched = [f"evaluate {arm} de seed 0" for arm in raw["arms"]]
            assert found == [*searched, "tokens de"]


def test_teacher_may_start_from_another_model(finished, tiny_models, tmp_path):
    config, out = finished
    raw = yaml.safe_load(config.read_text())
    raw["teacher"]["model"] = tiny_models.wide
    raw["arms"]["ot"]["start"] = "encoder"
    layout = Study(read_config(write(tmp_path, raw), out)).layout
    assert layout.teacher_start == tiny_models.wide
    assert layout.encoder_name == str(layout.encoder_folder / "final")
    student = layout.options(layout.config.arm("ot"), "sw", 0, "document").student
    assert student == layout.encoder_name
    assert "train encoder" not in unfinished(tmp_path / "study.yaml", out)
    # Without the key `encoder`, students start from the starting model of the teacher.
    del raw["encoder"]
    assert Study(read_config(write(tmp_path, raw), out)).layout.encoder_name == tiny_models.wide


def test_both_files_of_aligned_bitext_are_inputs(finished, tmp_path):
    config, out = finished
    raw = yaml.safe_load(config.read_text())
    sides = [tmp_path / "set=1.en", tmp_path / "set=1.sw"]
    raw["arms"]["ot"]["bitext"] = ",".join(map(str, sides))
    path, models = write(tmp_path, raw), set()
    for english, other in (("water", "maji"), ("rain", "maji"), ("rain", "mvua")):
        sides[0].write_text(f"{english}\n")
        sides[1].write_text(f"{other}\n")
        study = Study(read_config(path, out))
        models.add(study.layout.model_name(study.config.arms[1], "sw", 0))
    assert len(models) == 3


def test_output_folder_can_be_moved(finished, tmp_path):
    config, out = finished
    shutil.copytree(out, tmp_path / "moved")
    assert unfinished(config, tmp_path / "moved") == []


# --- interruptions -------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_interruptions_do_not_change_the_result(finished, tmp_path, monkeypatch, caplog):
    config, uninterrupted = finished
    out = tmp_path / "out"
    all_tasks, lines = Study.tasks, runner.ProgressLines
    write_text = evaluation_tasks.write_text
    ran = []

    def counted(self):
        for task in all_tasks(self):
            ran.append(task.label) if not task.done else None
            yield task

    def stop_between(self, after=3):
        for position, task in enumerate(all_tasks(self)):
            stopped = Task(task.label, task.kind, task.output, task.work, interrupt)
            yield stopped if position == after else task

    def interrupt():
        raise KeyboardInterrupt

    def stop_in_training(label):
        return StopAt(3) if label == "ot de seed 0" else lines(label)

    def stop_in_writing(path, text):
        if path.parent.name == "results" and path.name.startswith("switched-sw"):
            raise KeyboardInterrupt
        write_text(path, text)

    for target, name, value in (
        (Study, "tasks", lambda self: list(stop_between(self))),
        (runner, "ProgressLines", stop_in_training),
        (evaluation_tasks, "write_text", stop_in_writing),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, name, value)
            run_study(config, out)
        assert not (out / "report.md").exists()
        if name == "ProgressLines":
            (stopped,) = (out / "models").glob("ot-de-0-*")
            assert (stopped / "checkpoint-2").is_dir() and not (stopped / "final").exists()

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "optical"):
        patch.setattr(Study, "tasks", lambda self: list(counted(self)))
        run_study(config, out)
    # At least half of the tasks were not repeated.
    assert 0 < len(ran) < 8 and "evaluate switched sw seed 0" in ran
    assert numbers(out) == numbers(uninterrupted)


def test_costs_are_those_of_the_last_run_of_a_task(tmp_path):
    costs = Costs(tmp_path)
    outputs = {"train ot": "models/ot", "train pooled": "models/pooled"}
    ot, pooled = (Task(label, "", tmp_path / name, 1.0, print) for label, name in outputs.items())
    costs.add(ot, 100.0, 900.0)
    costs.add(pooled, 10.0, 9.0)
    costs.add(ot, 7.04, 800.0)
    assert costs.read([ot, pooled]) == {
        "train ot": {"seconds": 7.0, "peak_mb": 800.0},
        "train pooled": {"seconds": 10.0, "peak_mb": 9.0},
    }
    # Another study in the folder has a task with the same label and another output.
    other = Task("train ot", "", tmp_path / "models/ot-more", 1.0, print)
    costs.add(other, 5.0, 6.0)
    assert costs.read([other]) == {"train ot": {"seconds": 5.0, "peak_mb": 6.0}}
    assert costs.read([ot]) == {"train ot": {"seconds": 7.0, "peak_mb": 800.0}}


def test_truncated_result_repeats_only_its_task(finished, tmp_path, caplog):
    config, whole = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (torn,) = out.glob("results/ot-sw-0-*.json")
    torn.write_text(torn.read_text()[:50])
    (out / "costs.json").write_text("{")
    with caplog.at_level(logging.INFO, "optical"):
        run_study(config, out)
    assert f"{torn.name} is damaged" in caplog.text and "costs.json is damaged" in caplog.text
    assert len([line for line in caplog.messages if "about 0s left" in line]) == 1
    assert numbers(out) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_killed_study_gives_the_same_result(finished, tmp_path, sent):
    config, uninterrupted = finished
    out = tmp_path / "out"
    moments = {
        "after the encoder": lambda: list(out.glob("models/encoder-*/final")),
        "in the teacher's training": lambda: list(out.glob("models/teacher-*/checkpoint-*")),
        "after a student": lambda: list(out.glob("results/ot-sw-*.json")),
    }
    command = [sys.executable, "-m", "optical.cli", "study", str(config), "--output", str(out)]
    for moment, reached in moments.items():
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            begun = time.monotonic()
            while not reached():
                assert process.poll() is None, (moment, (tmp_path / "log").read_text())
                assert time.monotonic() - begun < 300, moment
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                os.kill(process.pid, sent)
            process.wait()
        log = (tmp_path / "log").read_text()
        if sent == signal.SIGINT:
            assert process.returncode == 130, (moment, log)
            assert log.endswith("interrupted; the same command continues where it stopped\n"), log
        else:
            assert process.returncode == -sent, (moment, log)
    run_study(config, out)
    assert numbers(out) == numbers(uninterrupted)


# --- errors are found before any training --------------------------------------------------------


WRONG = {
    "empty bitext": (
        {"arms.ot.bitext": "{tmp}/empty.tsv"},
        r"arm ot, language sw: .*empty\.tsv: no sentence pair",
    ),
    "no bitext in one language": (
        {"arms.ot.bitext": "{tmp}/bitext/en-{language}.tsv"},
        r"arm ot, language de: .*en-de\.tsv: no such file",
    ),
    "a language without a lexicon": (
        {"arms.switched.lexicon": "{tmp}/lexicon/en-{language}.tsv"},
        r"arm switched, language de: .*en-de\.tsv: no such file; .*remove the arm",
    ),
    "no option bitext": ({"arms.ot.bitext": []}, "arm ot, language sw: bitext: none given"),
    "epsilon": ({"arms.ot.epsilon": 0.0}, "arm ot, language sw: epsilon is 0.0; expected"),
    "backend": ({"arms.ot.backend": "gpu"}, "arm ot, language sw: backend is 'gpu'"),
    "probability": (
        {"arms.switched.probability": 2.0},
        "arm switched, language sw: probability: 2.0, expected a number from 0 to 1",
    ),
    "damaged text": ({"encoder.text": "{tmp}/damaged.gz"}, r"damaged\.gz:1: damaged gzip"),
    "heads": ({"encoder.heads": 3}, "heads: 3, expected a divisor of hidden_size 16"),
    "pairs": ({"teacher.pairs": "{tmp}/empty.tsv"}, r"empty\.tsv'\]: no training pair in it"),
    "no pairs": ({"teacher.pairs": []}, "pairs: none given; expected"),
    "documents": ({"collections.tiny.documents": "{tmp}/no.jsonl"}, r"no\.jsonl"),
    "judgements": ({"collections.tiny.qrels": "{tmp}/wrong.qrels"}, "none of the 1 judged"),
    "measure": ({"measures": ["AP", "nDGC@10"]}, r"measure.*'nDGC@10'"),
    "trainer argument": (
        {"arms.ot.arguments.lr_scheduler_type": "linaer"},
        "arms.ot.*linaer",
    ),
    "encoder": ({"encoder": "{tmp}/nothing/at/all"}, "nothing/at/all: no such folder"),
    "teacher": (
        {"teacher": "{tmp}/nothing/at/all", "arms.switched": {"recipe": "none"}},
        "nothing/at/all: no such folder",
    ),
    "student": ({"arms.ot.student": "{tmp}/nothing/at/all"}, "nothing/at/all: no such folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_found_before_any_training(world, tmp_path, monkeypatch, case):
    changes, message = WRONG[case]
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "damaged.gz").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "wrong.qrels").write_text("q0 0 d9999 1\n")
    for kind in ("bitext", "lexicon"):
        (tmp_path / kind).mkdir()
        shutil.copy(world / kind / "en-sw.tsv", tmp_path / kind)
    raw = copy.deepcopy(configuration(world))
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = raw
        for name in parents:
            place = place[name]
        place[last] = value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
    monkeypatch.setattr(runner, "run", never)
    monkeypatch.setattr("optical.retrieval.exact_search.search", never)
    with pytest.raises((ValueError, OSError), match=message) as error:
        run_study(write(tmp_path, raw), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_unwritable_output_folder_is_refused(world, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match=r"output folder .*out cannot be written .*choose another"):
        run_study(write(tmp_path, configuration(world)), tmp_path / "out")


def test_remaining_time():
    progress = Progress()

    def task(kind, work):
        return Task(kind, kind, Path("x"), work, never)

    assert progress.remaining([task("distill", 1)]) is None
    progress.add(task("teacher", 2.0), 20.0)
    # A kind without measurements is as fast as the average.
    assert progress.remaining([task("distill", 1), task("teacher", 1)]) == 20.0
    progress.add(task("distill", 1.0), 1.0)
    assert progress.remaining([task("distill", 3), task("teacher", 1)]) == 13.0
    assert progress.remaining([]) == 0.0


@pytest.mark.parametrize("package", ["yaml", "ir_measures", "matplotlib"])
def test_missing_package_names_the_extra(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}; .*"optical-ot\[study\]"'):
        run_study(tmp_path / "study.yaml", tmp_path / "out")


def test_fingerprints_of_renamed_options_keep_their_old_names(tmp_path):
    """Folders of studies that were run before a rename stay valid."""
    fingerprints = Fingerprints(tmp_path)
    options = CodeswitchOptions(model="m", role="both")
    assert fingerprints.options(options) == {"model": "m", "sides": "both"}
    options = TransferOptions(model="m", initialize_from="spelling")
    assert fingerprints.options(options) == {"model": "m", "vectors": "spelling"}
    assert fingerprints.options(DistillOptions(role="query")) == {"role": "query"}
    assert fingerprints.of({"b": 1, "a": [None, 0.5]}) == "175110073d"
