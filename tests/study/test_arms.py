"""Every kind of arm in one miniature study: training data, starting models and searches."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="needs the extra `study`")
pytest.importorskip("sentence_transformers", reason="needs the extra `study`")
pytest.importorskip("ir_measures", reason="needs the extra `study`")
pytest.importorskip("bm25s", reason="needs the extra `study`")
pytest.importorskip("matplotlib", reason="needs the extra `study`")

import yaml

from optical.cli import main as cli
from optical.data.pairs import join_pairs, read_bitext_pairs
from optical.report.table import read_rows
from optical.study.config import read_config
from optical.study.study import Study, run_study
from optical.training import runner

STEPS = {"max_steps": 2}


def configuration(world, tiny_models, folder):
    """Return a study of two languages with an arm of each kind, trained for two steps."""
    bitext = str(world / "bitext/en-{language}.tsv")
    distilled = {"recipe": "distill", "bitext": bitext, "max_iter": 5, "arguments": STEPS}
    lexicon = str(world / "lexicon/en-{language}.tsv")
    switched = {"recipe": "codeswitch", "start": "zeroshot", "arguments": STEPS}
    # Stand-ins for machine translations of the Swahili and German documents.
    english = (world / "documents/en.jsonl").read_text()
    for language in ("sw", "de"):
        (folder / f"tiny.{language}.jsonl").write_text(english)
    return {
        "output": str(folder / "out"),
        "languages": ["sw", "de"],
        "low": ["sw"],
        "high": ["de"],
        "measures": ["AP", "R@10"],
        "store_teacher": True,
        "passage_length": 5,
        "encode_bf16": True,
        "arguments": {"learning_rate": 0.01, "per_device_train_batch_size": 8, "max_length": 16},
        "encoder": tiny_models.mixed,
        "teacher": {"pairs": str(world / "teacher.tsv"), "document_length": 24, "arguments": STEPS},
        "lexicons": {
            "table": {"bitext": bitext, "least_count": 1},
            "plan": {"bitext": bitext, "arm": "ot", "max_pairs": 20, "least_count": 1},
        },
        "arms": {
            "zeroshot": {"recipe": "teacher"},
            "bm25": {"recipe": "bm25"},
            "bm25-queries": {"recipe": "bm25", "translate": {"queries": "table"}},
            "bm25-file": {"recipe": "bm25", "translate": {"documents": lexicon}, "k1": 0.9},
            "bm25-nmt": {
                "recipe": "bm25",
                "replace": {"documents": str(folder / "{collection}.{language}.jsonl")},
            },
            "averaged": {"recipe": "dense", "model": tiny_models.mixed, "query_prompt": "maji "},
            "other": {"recipe": "multivector", "model": tiny_models.teacher},
            "ot": {**distilled, "start": "zeroshot"},
            "ot-all": {**distilled, "multilingual": True, "seeds": [0, 1]},
            "ot-20": {**distilled, "max_pairs": 20, "join_characters": 60},
            "ot-idf": {**distilled, "mass": "idf", "rho": 0.5, "gradient": "implicit"},
            "position": {**distilled, "objective": "position"},
            "pooled": {**distilled, "objective": "pooled", "reads": "both"},
            "greedy": {**distilled, "objective": "greedy", "skip_frequent": 3},
            "contrastive": {**distilled, "objective": "contrastive"},
            "switched": {**switched, "lexicon": lexicon, "multilingual": True},
            "switched-table": {**switched, "lexicon": "table"},
            "switched-plan": {**switched, "lexicon": "plan"},
            "both": {**switched, "start": "ot", "lexicon": "table"},
            "together": {**distilled, "reads": "both", "lexicon": "table", "probability": 1.0},
            "english": {**distilled, "reads": "english"},
            "transfer": {
                "recipe": "transfer",
                "bitext": bitext,
                "vocabulary_size": 200,
                "multilingual": True,
            },
            "ot-transfer": {
                **distilled,
                "start": "transfer",
                "multilingual": True,
                "seeds": [0, 1],
            },
            "average": {
                "recipe": "average",
                "start": ["transfer", "ot-transfer"],
                "multilingual": True,
            },
            "half": {
                "recipe": "average",
                "start": ["teacher", "ot-all"],
                "multilingual": True,
                "seeds": [0, 1],
            },
            "ensemble": {
                "recipe": "ensemble",
                "arms": ["transfer", "ot-transfer"],
                "seeds": [0, 1],
            },
        },
        "against": ["zeroshot", "ot"],
        "translation": "bm25-queries",
        "curves": {"ot": ["ot-20", "ot"]},
        "collections": {
            "tiny": {
                "queries": str(world / "queries.tsv"),
                "documents": str(world / "documents/{language}.jsonl"),
                "qrels": str(world / "qrels.txt"),
                "pool": True,
            }
        },
        "word_alignment": {"bitext": bitext, "lexicon": lexicon, "max_pairs": 5},
        "alignment": {"language": "sw", "english": "the book", "other": "kitabu"},
    }


@pytest.fixture(scope="module")
def finished(world, tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    path = folder / "study.yaml"
    raw = configuration(world, tiny_models, folder)
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    run_study(path)
    return path, folder / "out"


def record(out, stem):
    (path,) = (out / "models").glob(f"{stem}-*/run.json")
    return json.loads(path.read_text())


def means(out):
    found = json.loads((out / "report.json").read_text())
    return {
        (row["arm"], row["language"]): row["mean"]
        for row in found["means"]
        if row["measure"] == "AP"
    }


def test_each_arm_has_the_configured_options(finished, world):
    config, out = finished
    trained = sorted(
        re.sub(r"-[0-9a-f]{10}$", "", path.name) for path in (out / "models").iterdir()
    )
    # Retrievers trained on English only and multilingual arms have one model for all languages. A
    # transfer has one model for all seeds.
    expected = [
        "teacher", "zeroshot-all-0", "ot-all-all-0", "ot-all-all-1", "switched-all-0",
        "transfer-all-0", "ot-transfer-all-0", "ot-transfer-all-1", "average-all-0",
        "half-all-0", "half-all-1",
        *(f"{arm}-{language}-0" for language in ("sw", "de") for arm in (
            "ot", "ot-20", "ot-idf", "position", "pooled", "greedy", "contrastive",
            "switched-table", "switched-plan", "both", "together", "english",
        )),
    ]  # fmt: skip
    assert trained == sorted(expected)

    options = record(out, "ot-all-all-0")["options"]
    assert options["bitext"] == [str(world / f"bitext/en-{x}.tsv") for x in ("sw", "de")]
    assert len(options["teacher_vectors"]) == 2 and options["student"] == ""
    assert "zeroshot-all-0" in record(out, "ot-sw-0")["options"]["student"]
    assert "ot-de-0" in record(out, "both-de-0")["options"]["model"]
    transferred = record(out, "transfer-all-0")
    assert transferred["options"]["bitext"] == options["bitext"]
    assert "teacher-" in transferred["options"]["model"]
    # The teacher still encodes the queries.
    assert read_config(config).arm("transfer").encodes == "role"
    assert "transfer-all-0" in record(out, "ot-transfer-all-0")["options"]["student"]
    teacher, student = record(out, "half-all-1")["options"]["models"]
    assert "teacher-" in teacher and "ot-all-all-1" in student
    lexicons = record(out, "switched-all-0")["options"]["lexicon"]
    assert [entry.split("=")[0] for entry in lexicons] == ["sw", "de"]
    (entry,) = record(out, "switched-plan-sw-0")["options"]["lexicon"]
    assert re.fullmatch(r"sw=.*/lexicons/plan-sw-[0-9a-f]{10}\.tsv", entry)


def test_teacher_vectors_are_stored_once_per_bitext_and_number_of_pairs(finished, world):
    _, out = finished
    stores = sorted(
        (path.parent.name.rsplit("-", 1)[0], json.loads(path.read_text())["documents"])
        for path in out.glob("vectors/*/index.json")
    )
    read = {x: read_bitext_pairs(world / f"bitext/en-{x}.tsv") for x in ("de", "sw")}
    pairs = {x: len(found) for x, found in read.items()}
    joined = {x: len(join_pairs(found[:20], 60)) for x, found in read.items()}
    assert stores == [(f"en-{x}", n) for x in read for n in (joined[x], pairs[x])]


def test_translation_matches_across_languages(finished):
    _, out = finished
    found = means(out)
    for language in ("sw", "de"):
        # No word of the queries occurs in the foreign documents.
        assert found["bm25", language] == 0
        assert found["bm25-queries", language] > 0.5
        assert found["bm25-nmt", language] == pytest.approx(found["bm25-file", language], abs=0.5)
        assert found["bm25-nmt", language] > 0.5


def test_models_as_they_are_search_with_their_own_vectors(finished, world, tiny_models):
    from optical.data.collection import load_collection
    from optical.retrieval.dense import load_dense, search_dense
    from optical.retrieval.evaluation import evaluate

    _, out = finished
    collection = load_collection(
        queries=world / "queries.tsv",
        documents=world / "documents/sw.jsonl",
        qrels=world / "qrels.txt",
    )
    model = load_dense(tiny_models.mixed, query_prompt="maji ")
    run = search_dense(model, collection, passage_length=5)
    expected = evaluate(run, collection.qrels, ["AP"]).mean["AP"]
    assert means(out)["averaged", "sw"] == pytest.approx(expected, abs=1e-4)
    assert ("other", "de") in means(out)
    rows = read_rows(out / "results.csv")
    assert not [row for row in rows if row["kind"] == "aer" and row["arm"] in ("averaged", "other")]


def test_an_ensemble_has_the_mean_scores_of_its_arms(finished):
    from optical.data.trec import read_run

    _, out = finished

    def run(arm, seed):
        (path,) = out.glob(f"runs/tiny.{arm}-sw-{seed}-*.run.gz")
        return read_run(path)

    start = run("transfer", 0)
    for seed in (0, 1):
        other, ensemble = run("ot-transfer", seed), run("ensemble", seed)
        assert ensemble.keys() == start.keys()
        for query, scores in ensemble.items():
            expected = {x: (start[query][x] + other[query][x]) / 2 for x in start[query]}
            assert scores == pytest.approx(expected, rel=1e-5)
    rows = read_rows(out / "results.csv")
    assert not [row for row in rows if row["kind"] == "aer" and row["arm"] == "ensemble"]
    assert any((out / "results").glob("pool-ensemble-1-*.json"))


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"recipe": "dense"}, "arms.late: no key `model`"),
        ({"recipe": "dense", "model": "{teacher}"}, "token vectors .*use the recipe `multivector`"),
        ({"recipe": "multivector", "model": "{mixed}"}, "one vector .*use the recipe `dense`"),
        ({"recipe": "multivector", "model": "./no/such/folder"}, "no such folder"),
        ({"recipe": "dense", "model": "hub/late"}, "token vectors .*use the recipe `multivector`"),
        ({"recipe": "multivector", "model": "hub/plain"}, "one vector .*use the recipe `dense`"),
        ({"recipe": "multivector", "model": "hub/empty"}, "no config.json or modules.json on the"),
        ({"recipe": "multivector", "model": "hub/x"}, "no such folder on this machine, and cannot"),
        ({"recipe": "dense", "model": "hub/x"}, "no such folder on this machine, and cannot be"),
        ({"recipe": "distill", "student": "hub/x", "bitext": "{bitext}"}, "hub/x: no such folder"),
        ({"recipe": "dense", "model": "x", "encodes": "role"}, "a dense model encodes both sides"),
    ],
)
def test_models_of_the_wrong_kind_are_refused_before_anything_runs(
    world, tiny_models, tmp_path, arm, message, monkeypatch
):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    real = huggingface_hub.hf_hub_download
    on_hub = {
        "hub/late": tiny_models.teacher, "hub/plain": tiny_models.mixed, "hub/empty": str(tmp_path)
    }  # fmt: skip

    def download(name, file):
        if name not in on_hub:
            return real(name, file)  # fails: the tests run offline
        if not (path := Path(on_hub[name]) / file).exists():
            raise EntryNotFoundError(file)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    raw = configuration(world, tiny_models, tmp_path)
    arm = {
        key: value.format(**vars(tiny_models), bitext=world / "bitext/en-sw.tsv")
        for key, value in arm.items()
    }
    raw["arms"] = {"zeroshot": {"recipe": "none"}, "late": arm}
    raw |= {"lexicons": {}, "curves": {}, "translation": "", "against": [], "word_alignment": None}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        run_study(path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/models/*"))


def test_pools_of_all_languages_are_reported(finished):
    from optical.data.trec import read_run

    _, out = finished
    found = {pool["arm"]: pool for pool in json.loads((out / "report.json").read_text())["pools"]}
    assert set(found) == set(configuration_arms(finished))
    for pool in found.values():
        assert sum(own["relevant"] for own in pool["bias"].values()) == pytest.approx(1)
        shares = [own["share"] for own in pool["bias"].values()]
        assert (pool["distance"] is None) == (None in shares)
        if None not in shares:
            assert sum(shares) == pytest.approx(1) and 0 <= pool["distance"] <= 1
    # Translated queries find the documents of both languages, others none.
    assert found["bm25"]["estimate"][0] == 0
    (path,) = (out / "runs").glob("tiny-pool.pool-ot-0-*")
    pooled = read_run(path)
    for language in ("sw", "de"):
        (path,) = (out / "runs").glob(f"tiny.ot-{language}-0-*")
        for query, scores in read_run(path).items():
            own = {d: s for d, s in pooled[query].items() if d.startswith(f"{language}:")}
            assert own == pytest.approx({f"{language}:{d}": s for d, s in scores.items()}, abs=1e-5)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert (
        "## Mixed-language pools" in text
        and "| arm | MAP | minus zeroshot | bias | sw | de |" in text
    )


def configuration_arms(finished):
    return yaml.safe_load(finished[0].read_text())["arms"]


def test_induced_lexicons_contain_the_translations(finished):
    from optical.data.lexicon import read_lexicon

    _, out = finished
    (table,) = (out / "lexicons").glob("table-sw-*.tsv")
    lexicon = read_lexicon(table)
    expected = {"bread": "mkate", "water": "maji", "teacher": "mwalimu", "sees": "anaona"}
    assert {word: lexicon[word][0] for word in expected} == expected
    (plan,) = (out / "lexicons").glob("plan-de-*.tsv")
    assert read_lexicon(plan)


def test_report_has_the_configured_tables(finished):
    _, out = finished
    found = json.loads((out / "report.json").read_text())
    tested = {(row["arm"], row["against"]) for row in found["comparisons"]}
    assert {against for _, against in tested} == {"zeroshot", "ot"}
    assert ("ot", "zeroshot") in tested and ("zeroshot", "ot") not in tested
    assert len(found["comparisons"]) == 2 * len(tested) == 2 * (25 + 24)
    gaps = {row["arm"]: row for row in found["gaps"]}
    assert gaps["ot"]["gain_low"] and gaps["bm25-queries"]["gain_low"] is None
    rates = {(row["arm"], row["language"]): row["rate"] for row in found["alignment_error_rates"]}
    assert all(0 <= rate <= 1 for rate in rates.values())
    assert ("ot", "sw") in rates and ("bm25", "sw") not in rates
    assert found["tokens"]["sw"]["teacher"]["tokens"] >= 1
    vocabularies = [arm for arm in found["tokens"]["sw"] if arm not in ("teacher", "encoder")]
    assert vocabularies == ["transfer"]
    # Few words of the documents are in no sentence pair.
    assert set(found["unseen"]) == {"sw", "de"} and 0 <= found["unseen"]["sw"] < 0.5
    unseen = {r["language"]: r["value"] for r in read_rows(out / "results.csv")
              if r["kind"] == "unseen"}  # fmt: skip
    assert unseen == pytest.approx(found["unseen"])

    text = (out / "report.md").read_text(encoding="utf-8")
    for part in ("Gain over the translation baseline", "Tokenizers", "Word alignment", "Cost"):
        assert f"## {part}" in text
    assert "](figures/pairs.png)" in text


def test_figures_are_drawn_from_the_table_alone(finished, tmp_path, capsys):
    _, out = finished
    rows = read_rows(out / "results.csv")
    curve = [(r["against"], r["pairs"]) for r in rows if r["kind"] == "curve" and r["name"] == "sw"]
    assert [arm for arm, _ in curve] == ["ot", "ot-20"] and curve[1][1] == 20 < curve[0][1]
    seconds = {row["arm"]: row["value"] for row in rows if row["kind"] == "seconds"}
    assert seconds["ot"] > 0 and seconds["bm25"] >= 0
    # Two steps are too few for a logged loss.
    for name in ("results.csv", "alignment.csv", "queries.csv"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    assert cli.main(["figures", str(tmp_path / "results.csv"), "--output", str(tmp_path)]) == 0
    drawn = sorted(path.name for path in tmp_path.glob("*.*") if path.suffix != ".csv")
    assert drawn == sorted(path.name for path in (out / "figures").iterdir())
    assert len(capsys.readouterr().out.splitlines()) == len(drawn) == 5
    for name in drawn:
        assert (tmp_path / name).read_bytes() == (out / "figures" / name).read_bytes()


def unfinished(path):
    return [task.label for task in Study(read_config(path)).tasks() if not task.done]


def test_new_arm_adds_only_its_own_tasks(finished, monkeypatch, tmp_path):
    path, _ = finished
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("a finished task ran again"))
    assert unfinished(path) == []
    raw = yaml.safe_load(path.read_text())
    raw["arms"]["more"] = {**raw["arms"]["ot"], "epsilon": 0.1}
    new = tmp_path / "study.yaml"
    new.write_text(yaml.safe_dump(raw, sort_keys=False))
    expected = [
        f"{verb} more {language} seed 0"
        for language in ("sw", "de")
        for verb in ("train", "evaluate", "words")
    ] + ["pool more seed 0"]
    assert unfinished(new) == expected


def test_dependent_arms_are_repeated_with_an_arm(finished, tmp_path):
    path, _ = finished
    raw = yaml.safe_load(path.read_text())
    raw["arms"]["ot"]["epsilon"] = 0.2
    new = tmp_path / "study.yaml"
    new.write_text(yaml.safe_dump(raw, sort_keys=False))
    found = unfinished(new)
    for label in ("train ot sw seed 0", "lexicon plan sw", "train switched-plan sw seed 0",
                  "train both de seed 0", "evaluate both de seed 0", "alignment"):  # fmt: skip
        assert label in found
    assert not [label for label in found if "switched-table" in label or "ot-all" in label]


def test_both_roles_in_one_study(world, tiny_models, tmp_path):
    """One collection has foreign documents, another has foreign queries."""
    for language in ("sw", "de"):
        (tmp_path / f"queries.{language}.tsv").write_text((world / "queries.tsv").read_text())
    raw = configuration(world, tiny_models, tmp_path)
    raw["arms"] = {name: raw["arms"][name] for name in ("zeroshot", "ot")}
    raw["lexicons"], raw["curves"], raw["translation"] = {}, {}, ""
    raw["ceiling"] = []
    raw["report"] = "one"
    raw["collections"]["asked"] = {
        "role": "query",
        "languages": ["de"],
        "queries": str(tmp_path / "queries.{language}.tsv"),
        "documents": str(world / "documents/en.jsonl"),
        "qrels": str(world / "qrels.txt"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    run_study(path)
    out = tmp_path / "out"
    roles = {record_["options"]["role"] for record_ in map(json.loads, (
        found.read_text() for found in (out / "models").glob("ot-de-*/run.json")
    ))}  # fmt: skip
    assert roles == {"document", "query"}
    assert len(list((out / "models").glob("ot-sw-*"))) == 1
    found = json.loads((out / "one/report.json").read_text())
    places = {(row["collection"], row["language"]) for row in found["means"]}
    assert places == {("tiny", "sw"), ("tiny", "de"), ("asked", "de")}
    # A collection without one of the languages has no gap.
    assert {row["collection"] for row in found["gaps"]} == {"tiny"}
    assert "asked" in (out / "one/report.md").read_text()
    assert len(list((out / "models").glob("zeroshot-*"))) == 1
