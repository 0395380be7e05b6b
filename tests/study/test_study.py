"""A miniature study: its report, and that no interruption and no change is ever mistaken."""

import copy
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

from optical.study import evaluation_tasks, tasks
from optical.study.config import read_config
from optical.study.study import Study, run_study
from optical.study.tasks import Cell, Costs, Progress
from optical.training import recipes as training
from optical.training import runner

FIGURES = ("measure_per_language.png", "gap_per_arm.png", "alignment.png")


def configuration(world):
    """The miniature: 14 cells, a handful of steps each."""
    return {
        "title": "A miniature <study>",
        "note": "Nothing & nobody.",
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
    """Configuration and output folder of the study, run without interruption."""
    folder = tmp_path_factory.mktemp("study")
    config = write(folder, configuration(world))
    assert run_study(config, folder / "out") == folder / "out/report.md"
    return config, folder / "out"


def numbers(folder):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


# --- the report ----------------------------------------------------------------------------------


def test_the_report_holds_every_number(finished):
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
    assert text.startswith("# A miniature <study>\n\nNothing & nobody.")
    for (arm, language), mean in means.items():
        assert f"{mean:.3f}" in text and arm in text and (language == "en" or language in text)
    assert "Swahili" in text and "MAP" in text and "Holm" in text
    assert "max_iter: 10" in text and "torch" in text
    for figure in FIGURES:
        assert f"](figures/{figure})" in text


def test_the_page_stands_alone(finished):
    _, out = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>A miniature &lt;study&gt;</h1>" in page and "Nothing &amp; nobody." in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for tag in ("table", "figure", "ul", "div", "pre", "thead", "tbody"):
        assert page.count(f"<{tag}") == page.count(f"</{tag}>")


def test_the_figures_show_something(finished):
    from matplotlib.image import imread

    for name in FIGURES:
        path = finished[1] / "figures" / name
        pixels = imread(path)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.02


def test_runs_and_records_are_kept(finished, world):
    from optical.data.trec import read_run

    _, out = finished
    runs = sorted((out / "runs").glob("tiny.*.run.gz"))
    assert len(runs) == 7
    queries = {line.split("\t")[0] for line in (world / "queries.tsv").read_text().splitlines()}
    assert all(read_run(path).keys() == queries for path in runs)
    records = sorted((out / "models").glob("*/run.json"))
    assert len(records) == 6
    recipes = {json.loads(path.read_text())["recipe"] for path in records}
    assert recipes == {"encoder", "teacher", "distill", "codeswitch"}
    # What is finished needs no checkpoint.
    assert not list((out / "models").glob("*/checkpoint-*"))
    (row,) = [json.loads(path.read_text()) for path in (out / "results").glob("alignment-*")]
    total = sum(sum(masses) for masses in row["plan"])
    assert total == pytest.approx(1, abs=1e-3) and row["language"] == "sw"
    assert len(row["plan"]) == len(row["other_tokens"])
    assert not list(out.rglob(".*"))


# --- what is finished, and what is not -----------------------------------------------------------


def never(*args, **kwargs):
    raise AssertionError("a finished cell ran again")


def test_a_second_run_runs_no_cell(finished, monkeypatch, caplog):
    config, out = finished
    before = numbers(out)
    files = {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")}
    monkeypatch.setattr(runner, "run", never)
    monkeypatch.setattr("optical.retrieval.exact_search.search", never)
    monkeypatch.setattr("optical.models.word_alignment.align_tokens", never)
    with caplog.at_level(logging.INFO, "optical"):
        run_study(config, out)
    assert "17 cells, 17 finished before" in caplog.text
    assert numbers(out) == before
    assert {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")} == files


def left(config, out):
    """Labels of the cells that a run would run."""
    return [cell.label for cell in Study(read_config(config, out)).cells() if not cell.done]


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
def test_a_change_runs_what_depends_on_it_and_nothing_else(finished, world, tmp_path, change):
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
    expected = [c.label for c in Study(read_config(path, out)).cells() if depends(c.label)]
    assert left(path, out) == expected
    assert change in ("title", "save_steps") or expected


def test_changed_files_run_what_reads_them(finished, tmp_path):
    config, out = finished
    raw = yaml.safe_load(config.read_text())
    for name, place, key in (
        ("en-sw.tsv", raw["arms"]["ot"], "bitext"),
        ("de.jsonl", raw["collections"]["tiny"], "documents"),
    ):
        folder = tmp_path / key
        shutil.copytree(Path(place[key]).parent, folder)
        place[key] = f"{folder}/{Path(place[key]).name}"
        # The same contents elsewhere are the same study.
        path = write(tmp_path, raw)
        assert left(path, out) == []
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("maji", "mvua").replace("Wasser", "Regen"))
        found = left(path, out)
        (folder / name).write_text(text)
        if key == "bitext":
            assert found == ["train ot sw seed 0", "evaluate ot sw seed 0", "alignment"]
        else:
            searched = [f"evaluate {arm} de seed 0" for arm in raw["arms"]]
            assert found == [*searched, "tokens de"]


def test_the_teacher_may_start_from_a_model_of_its_own(finished, tiny_models, tmp_path):
    config, out = finished
    raw = yaml.safe_load(config.read_text())
    raw["teacher"]["model"] = tiny_models.wide
    raw["arms"]["ot"]["start"] = "encoder"
    found = Study(read_config(write(tmp_path, raw), out))
    assert found.teacher_start == tiny_models.wide
    assert found.encoder_name == str(found.encoder_folder / "final")
    student = found.options(found.config.arm("ot"), "sw", 0, "document").student
    assert student == found.encoder_name
    assert "train encoder" not in left(tmp_path / "study.yaml", out)
    # Without an encoder of its own, a study's students start where the teacher did.
    del raw["encoder"]
    assert Study(read_config(write(tmp_path, raw), out)).encoder_name == tiny_models.wide


def test_both_of_two_aligned_files_are_read(finished, tmp_path):
    config, out = finished
    raw = yaml.safe_load(config.read_text())
    sides = [tmp_path / "set=1.en", tmp_path / "set=1.sw"]
    raw["arms"]["ot"]["bitext"] = ",".join(map(str, sides))
    path, models = write(tmp_path, raw), set()
    for english, other in (("water", "maji"), ("rain", "maji"), ("rain", "mvua")):
        sides[0].write_text(f"{english}\n")
        sides[1].write_text(f"{other}\n")
        found = Study(read_config(path, out))
        models.add(found.student_name(found.config.arms[1], "sw", 0))
    assert len(models) == 3


def test_the_output_folder_can_be_moved(finished, tmp_path):
    config, out = finished
    shutil.copytree(out, tmp_path / "moved")
    assert left(config, tmp_path / "moved") == []


# --- interruptions -------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_study_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch, caplog):
    config, uninterrupted = finished
    out = tmp_path / "out"
    cells, lines, write_text = Study.cells, runner.progress_lines, evaluation_tasks.write_text
    ran = []

    def counted(self):
        for cell in cells(self):
            ran.append(cell.label) if not cell.done else None
            yield cell

    def stop_between(self, after=3):
        for position, cell in enumerate(cells(self)):
            yield (
                Cell(cell.label, cell.kind, cell.mark, cell.work, interrupt)
                if (position == after)
                else cell
            )

    def interrupt():
        raise KeyboardInterrupt

    def stop_in_training(label):
        return StopAt(3) if label == "ot de seed 0" else lines(label)

    def stop_in_writing(path, text):
        if path.parent.name == "results" and path.name.startswith("switched-sw"):
            raise KeyboardInterrupt
        write_text(path, text)

    for target, name, value in (
        (Study, "cells", lambda self: list(stop_between(self))),
        (training, "progress_lines", stop_in_training),
        (evaluation_tasks, "write_text", stop_in_writing),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, name, value)
            run_study(config, out)
        assert not (out / "report.md").exists()
        if name == "progress_lines":
            (stopped,) = (out / "models").glob("ot-de-0-*")
            assert (stopped / "checkpoint-2").is_dir() and not (stopped / "final").exists()

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "optical"):
        patch.setattr(Study, "cells", lambda self: list(counted(self)))
        run_study(config, out)
    # One half of the work was not done twice.
    assert 0 < len(ran) < 8 and "evaluate switched sw seed 0" in ran
    assert numbers(out) == numbers(uninterrupted)


def test_a_cell_that_is_made_anew_costs_what_it_took_then(tmp_path):
    costs = Costs(tmp_path)
    marks = {"train ot": "models/ot", "train pooled": "models/pooled"}
    ot, pooled = (Cell(label, "", tmp_path / mark, 1.0, print) for label, mark in marks.items())
    costs.add(ot, 100.0, 900.0)
    costs.add(pooled, 10.0, 9.0)
    costs.add(ot, 7.04, 800.0)
    assert costs.read([ot, pooled]) == {
        "train ot": {"seconds": 7.0, "peak_mb": 800.0},
        "train pooled": {"seconds": 10.0, "peak_mb": 9.0},
    }
    # A study beside it, with a cell of that name that makes something else.
    other = Cell("train ot", "", tmp_path / "models/ot-more", 1.0, print)
    costs.add(other, 5.0, 6.0)
    assert costs.read([other]) == {"train ot": {"seconds": 5.0, "peak_mb": 6.0}}
    assert costs.read([ot]) == {"train ot": {"seconds": 7.0, "peak_mb": 800.0}}


def test_a_torn_result_is_made_anew_and_nothing_else(finished, tmp_path, caplog):
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
def test_a_killed_study_ends_as_if_it_had_not_been(finished, tmp_path, sent):
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


# --- what is wrong shows before any training ------------------------------------------------------


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
        r"arm switched, language de: .*en-de\.tsv: no such file; .*leave the arm",
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
    "judgements": ({"collections.tiny.qrels": "{tmp}/wrong.qrels"}, "d9999"),
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
def test_what_is_wrong_shows_before_any_training(world, tmp_path, monkeypatch, case):
    changes, message = WRONG[case]
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "damaged.gz").write_bytes(b"\x1f\x8b\x08")
    qrels = (world / "qrels.txt").read_text()
    (tmp_path / "wrong.qrels").write_text(f"{qrels}q0 0 d9999 1\n")
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


def test_an_output_folder_that_cannot_be_written(world, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match=r"output folder .*out cannot be written .*choose another"):
        run_study(write(tmp_path, configuration(world)), tmp_path / "out")


def test_time_left():
    progress = Progress()

    def cell(kind, work):
        return Cell(kind, kind, Path("x"), work, never)

    assert progress.left([cell("distill", 1)]) is None
    progress.add(cell("teacher", 2.0), 20.0)
    # Nothing is known of the kind yet: as fast as everything so far.
    assert progress.left([cell("distill", 1), cell("teacher", 1)]) == 20.0
    progress.add(cell("distill", 1.0), 1.0)
    assert progress.left([cell("distill", 3), cell("teacher", 1)]) == 13.0
    assert progress.left([]) == 0.0
