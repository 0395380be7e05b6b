"""Configuration of a study: every key is read, and every error is one line with the key."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="needs the extra `study`")
pytest.importorskip("sentence_transformers", reason="needs the extra `study`")

import yaml
from transformers import HfArgumentParser

from optical.io.settings import nearest, parse_yaml
from optical.study.config import read_config
from optical.training.options import CodeswitchOptions, DistillOptions
from optical.training.recipes import CommandLineTrainerArguments

EXAMPLES = Path(__file__).parents[2] / "examples"
USUAL = {
    "output": "out",
    "languages": ["sw", "de"],
    "low": ["sw"],
    "high": ["de"],
    "encoder": "some/encoder",
    "arguments": {"max_steps": 5, "learning_rate": 0.001},
    "teacher": {"pairs": "./teacher.tsv", "arguments": {"max_steps": 7}},
    "arms": {
        "zeroshot": {"recipe": "none"},
        "ot": {"recipe": "distill", "bitext": "../bitext/en-{language}.tsv", "epsilon": 0.1},
        "switched": {
            "recipe": "codeswitch",
            "lexicon": "${LEXICA}/en-{language}.tsv",
            "arguments": {"max_steps": 9},
        },
    },
    "collections": {
        "news": {"queries": "./q.tsv", "documents": "./{language}.tsv", "qrels": "./r"}
    },
}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read USUAL with one change: a dotted key and its value, None to remove it."""
    monkeypatch.setenv("LEXICA", "/lexica")

    def make(key="", value=None):
        raw = copy.deepcopy(USUAL)
        *parents, last = key.split(".")
        place = raw
        for name in parents:
            place = place[name]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        return read_config(path)

    return make


def test_all_keys_are_read(read, tmp_path):
    config = read()
    assert config.title == "study" and str(config.output) == "out" and config.role == "document"
    assert config.languages == ("sw", "de") and config.seeds == (0,)
    study = config.describe()
    assert [study.group_of(language) for language in ("sw", "de", "fi")] == ["low", "high", ""]
    assert study.arms == ("zeroshot", "ot", "switched") and study.collections == ("news",)
    assert config.teacher_options.pairs == [str(tmp_path / "teacher.tsv")]
    # Trainer arguments of the teacher extend the common ones.
    assert config.teacher_trainer_args == {"max_steps": 7, "learning_rate": 0.001}
    zeroshot, ot, switched = config.arms
    encodes = (zeroshot.encodes, ot.encodes, switched.encodes)
    assert zeroshot.recipe == "none" and encodes == ("both", "role", "both")
    assert zeroshot.resolve_options("sw", "teacher", config) is None
    assert ot.resolve_options("sw", "teacher", config) == DistillOptions(
        teacher="teacher",
        role="document",
        epsilon=0.1,
        bitext=[str(tmp_path / "../bitext/en-sw.tsv")],
    )
    assert switched.resolve_options("de", "teacher", config) == CodeswitchOptions(
        model="teacher",
        role="document",
        pairs=config.teacher_options.pairs,
        lexicon=["de=/lexica/en-de.tsv"],
    )
    assert (ot.trainer_args["max_steps"], switched.trainer_args["max_steps"]) == (5, 9)
    assert config.config_text == (tmp_path / "study.yaml").read_text()


def test_multilingual_arm_trains_on_every_language(read, tmp_path):
    read("arms.ot.multilingual", True)
    path = tmp_path / "study.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["arms"]["switched"]["multilingual"] = True
    raw["lexicons"] = {"table": {"bitext": "en-{language}.tsv"}}
    raw["arms"]["more"] = {**raw["arms"]["switched"], "lexicon": ["table", "de=own.tsv"]}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    config = read_config(path)
    _, ot, switched, more = config.arms
    both = ("sw", "de")
    assert ot.resolve_options(both, "t", config).bitext == [
        str(tmp_path / f"../bitext/en-{language}.tsv") for language in both
    ]
    assert switched.resolve_options(both, "t", config).lexicon == [
        f"{language}=/lexica/en-{language}.tsv" for language in both
    ]
    resolved = more.resolve_options(
        both, "t", config, lexicon_path=lambda name, one: f"{name}.{one}"
    )
    assert resolved.lexicon == ["sw=table.sw", "de=table.de", "de=own.tsv"]
    assert more.induced_lexicons(config) == ["table"] and switched.induced_lexicons(config) == []


def test_starting_models_of_arms(read):
    config = read("arms.more", {"recipe": "teacher", "arguments": {"max_steps": 2}})
    more = config.arm("more")
    # A new retriever: pairs and limits of the teacher, starting from the encoder.
    assert (more.start, more.multilingual) == (("encoder",), True)
    assert more.trainer_args == {**config.teacher_trainer_args, "max_steps": 2}
    options = more.resolve_options("sw", "t", config, start=("e",))
    assert (options.model, options.pairs) == ("e", config.teacher_options.pairs)
    config = read("arms.more", {"recipe": "average", "start": ["ot", "switched"]})
    more = config.arm("more").resolve_options("sw", "t", config, start=("a", "b"))
    assert more.models == ["a", "b"]
    for start in ("ot", ["ot"], []):
        with pytest.raises(ValueError, match=r"arms.more.start: .*, expected two arms or more"):
            read("arms.more", {"recipe": "average", "start": start})
    with pytest.raises(ValueError, match=r"'encoder', expected teacher or ot or switched"):
        read("arms.more", {"recipe": "average", "start": ["ot", "encoder"]})
    config = read("arms.more", {"recipe": "distill", "bitext": "b", "start": "ot"})
    assert config.arm("more").resolve_options("sw", "t", config, start=("s",)).student == "s"
    with pytest.raises(ValueError, match=r"more is multilingual but starts from ot, which has a"):
        read("arms.more", {"recipe": "distill", "start": "ot", "multilingual": True})


def test_an_ensemble_needs_two_arms_above_it_with_token_vectors(read):
    config = read("arms.more", {"recipe": "ensemble", "arms": ["ot", "switched"], "seeds": [0, 2]})
    assert config.arm("more").members == ("ot", "switched")
    assert config.arm("more").seeds == (0, 2)
    for arms in ([], ["ot"], ["ot", "ot"]):
        with pytest.raises(ValueError, match=r"arms.more.arms: .*, expected two different arms"):
            read("arms.more", {"recipe": "ensemble", "arms": arms})
    with pytest.raises(ValueError, match=r"arms.more.arms: 'more', expected \w+ or ot or switched"):
        read("arms.more", {"recipe": "ensemble", "arms": ["ot", "more"]})
    with pytest.raises(ValueError, match=r"arms.more: an ensemble has no texts of its own"):
        read(
            "arms.more",
            {"recipe": "ensemble", "arms": ["ot", "switched"], "translate": {"queries": "x"}},
        )


def test_pools_hold_all_languages_or_some_of_them(read):
    for value in (True, ["de", "sw"]):
        config = read("collections.news.pool", value)
        assert (
            set(config.pools["news"]) == {"sw", "de"} and "pool" not in config.collections["news"]
        )
    assert read("collections.news.pool", False).pools == {}
    with pytest.raises(ValueError, match=r"asked\.pool: the documents of a collection of foreign"):
        read("collections.asked", {"source": "x", "role": "query", "pool": True})


def test_collections_choose_judgements_and_fields(read):
    parts = {"source": "beir/{language}", "split": "dev", "query_fields": ["title", "desc"]}
    config = read("collections.news", {**parts, "ignore_identical_ids": True})
    assert config.collections["news"] == {**parts, "ignore_identical_ids": True}
    # Defaults leave the fingerprints of finished tasks as they are.
    off = {"source": "x", "query_fields": [], "ignore_identical_ids": False}
    assert read("collections.news", off).collections["news"] == {"source": "x"}


def test_collections_may_have_another_role(read):
    config = read("collections.asked", {"source": "x", "role": "query"})
    assert config.roles == ["document", "query"]
    assert [config.role_of(name) for name in config.collections] == ["document", "query"]
    ot = config.arm("ot")
    assert ot.resolve_options("sw", "t", config, role="query").role == "query"
    assert config.arm("switched").resolve_options("sw", "t", config, role="query").role == "query"


def test_induced_lexicon_needs_an_earlier_arm(read, tmp_path):
    read("lexicons", {"plan": {"bitext": "b", "arm": "switched"}})
    path = tmp_path / "study.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["arms"]["switched"]["lexicon"] = "plan"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(
        ValueError, match="is induced from the arm switched, which must come before"
    ):
        read_config(path)


def test_base_file_is_overridden(read, tmp_path):
    read()
    path = tmp_path / "more.yaml"
    path.write_text(
        "base: study.yaml\nseeds: [1, 2]\narguments: {max_steps: 9}\n"
        "arms: {ot: {epsilon: 0.3}, zeroshot: null}\n"
    )
    config = read_config(path)
    assert config.seeds == (1, 2) and config.languages == ("sw", "de")
    assert [arm.name for arm in config.arms] == ["ot", "switched"]
    assert config.arm("ot").options["epsilon"] == 0.3 and config.arm("ot").options["bitext"]
    assert config.arm("ot").trainer_args == {"max_steps": 9, "learning_rate": 0.001}
    assert "epsilon: 0.3" in config.config_text and "some/encoder" in config.config_text
    path.write_text("base: more.yaml\n")
    with pytest.raises(ValueError, match="is based on this file itself"):
        read_config(path)
    path.write_text("base: no.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"no\.yaml: no such configuration file"):
        read_config(path)


def test_output_argument_overrides_the_file(read, tmp_path):
    read()
    assert str(read_config(tmp_path / "study.yaml", "other").output) == "other"


def test_embedded_study(tmp_path):
    # The command-line parser changes the types of the trainer's dataclass fields.
    HfArgumentParser((CommandLineTrainerArguments,), add_help=False)
    config = read_config(None, tmp_path / "out")
    assert config.phrasebook and len(config.languages) == 7
    assert config.teacher_options.pairs == [str(tmp_path / "out/data/teacher.tsv")]
    for arm in config.arms:
        options = arm.resolve_options("sw", "teacher", config)
        assert options is None or options.validate() is None


def test_norwegian_is_not_read_as_false(read):
    assert read("languages", ["sw", "de", False]).languages == ("sw", "de", "no")


def test_exponents_need_no_decimal_point(read, tmp_path):
    read()
    path = tmp_path / "study.yaml"
    text = path.read_text().replace("epsilon: 0.1", "epsilon: 5e-2")
    text = text.replace("learning_rate: 0.001", "learning_rate: 1e-3")
    path.write_text(text)
    # YAML 1.1 reads 1e-3 as text.
    assert yaml.safe_load(text)["arguments"]["learning_rate"] == "1e-3"
    config = read_config(path)
    assert config.arms[1].options["epsilon"] == 0.05
    assert config.arms[1].trainer_args["learning_rate"] == 0.001
    assert isinstance(config.arms[1].trainer_args["max_steps"], int)


@pytest.mark.parametrize("text", ["1e-4", "1E+5", "-3e2", "+1e0", ".5e1", "5.e-1", "12e03"])
def test_exponents_are_parsed_as_numbers(text):
    found = parse_yaml(f"a: {text}\nb: [{text}]\nc: {{d: {text}}}\n", "here")
    assert found == {"a": float(text), "b": [float(text)], "c": {"d": float(text)}}
    assert isinstance(found["a"], float)


@pytest.mark.parametrize("text", ["e1", "1e", "1e-", "1e4x", "'1e-4'", "1e-4.5", "v1e4"])
def test_malformed_numbers_are_text(text):
    assert parse_yaml(f"a: {text}\n", "here") == {"a": text.strip("'")}


def test_the_global_yaml_loader_is_unchanged():
    parse_yaml("a: 1e-4\n", "here")
    assert yaml.safe_load("1e-4") == "1e-4"


WRONG = [
    ("languagez", ["sw"], "unknown key `languagez` in the study; did you mean `languages`"),
    ("arms.ot.epsilom", 1, "unknown key `epsilom` in arms.ot; did you mean `epsilon`"),
    ("arms.ot.resume", True, "unknown key `resume` in arms.ot"),
    ("arms.zeroshot.epsilon", 1, "unknown key `epsilon` in arms.zeroshot"),
    ("teacher.pair", "a", "unknown key `pair` in teacher; did you mean `pairs`"),
    ("arguments.max_step", 1, "unknown key `max_step` in arguments; did you mean `max_steps`"),
    ("teacher.arguments.lr", 1, "unknown key `lr` in teacher.arguments"),
    (
        "arms.ot.arguments",
        {"output_dir": "x"},
        "unknown key `output_dir` in arms.ot.arguments",
    ),
    ("collections.news.query", "q", "unknown key `query` in collections.news; did you mean `quer"),
    ("collections.news", "wikiclir/sw", "collections.news: expected keys and values"),
    ("collections", ["news"], "collections: expected names with their files"),
    ("languages", None, "no key `languages`; it is required"),
    ("languages", "sw", "languages: 'sw', expected a list"),
    ("teacher", None, "no key `teacher`; it is required"),
    ("arms", None, "no key `arms`; it is required"),
    ("arms", ["ot"], "arms: expected keys and values"),
    ("arms.ot", ["distill"], "arms.ot: expected keys and values"),
    ("arms.ot.arguments", "fast", "arms.ot.arguments: expected keys and values"),
    ("collections", None, "no key `collections`; it is required"),
    ("encoder", None, "no key `encoder` for the teacher to start from"),
    ("output", None, "no key `output`, and no --output given"),
    ("role", "passage", "role: 'passage', expected query or document"),
    (
        "arms.ot.recipe",
        "ot",
        "arms.ot.recipe: 'ot', expected none or bm25 or distill or codeswitch or teacher",
    ),
    ("arms.ot.encodes", "all", "arms.ot.encodes: 'all', expected both or role"),
    ("low", ["so"], "low: 'so', expected sw or de"),
    ("seeds", "many", "seeds: 'many', expected whole numbers"),
    ("seeds", [], "seeds: [], expected whole numbers"),
    ("names", ["Swahili"], "names: expected keys and values"),
    ("alignment", ["sw"], "alignment: expected keys and values"),
    (
        "alignment",
        {"language": "so", "english": "a", "other": "b"},
        "alignment.language: 'so', expected sw or de",
    ),
    ("alignment", {"language": "sw", "english": "water"}, "alignment: no key `other`"),
    (
        "alignment",
        {"arm": "zeroshot", "language": "sw", "english": "a", "other": "b"},
        "alignment.arm: 'zeroshot', expected ot",
    ),
    ("lexicons", {"t": {"bitex": "a"}}, "unknown key `bitex` in lexicons.t; did you mean `bitext`"),
    ("lexicons", {"t": {"arm": "zeroshot"}}, "lexicons.t.arm: 'zeroshot', expected ot or switched"),
    (
        "arms.zeroshot.translate",
        {"query": "t"},
        "unknown key `query` in arms.zeroshot.translate; did you mean `queries`",
    ),
    ("arms.ot.start", "switched", "arms.ot.start: 'switched', expected teacher or encoder"),
    (
        "arms.ot.start",
        ["teacher", "encoder"],
        "arms.ot.start: ['teacher', 'encoder'], expected one name at most",
    ),
    (
        "arms.ot.objective",
        "mse",
        "arms.ot.objective: 'mse', expected ot or divergence or position or",
    ),
    ("arms.ot.multilingual", "yes", "arms.ot.multilingual: 'yes', expected bool"),
    ("arms.zeroshot.seeds", [1], "unknown key `seeds` in arms.zeroshot"),
    ("collections.news.role", "both", "collections.news.role: 'both', expected query or document"),
    ("collections.news.pool", ["sw"], "collections.news.pool: ['sw'], expected true, or two lang"),
    ("collections.news.pool", ["sw", "fi"], "collections.news.pool: 'fi', expected sw or de"),
    (
        "collections.news.query_fields",
        "title",
        "collections.news.query_fields: 'title', expected a",
    ),
    ("collections.news.split", "dev", "collections.news.split: selects judgements of a `source`"),
    (
        "collections.news.ignore_identical_ids",
        "yes",
        "collections.news.ignore_identical_ids: 'yes', expected bool",
    ),
    ("collections.news.pool", "sw", "collections.news.pool: 'sw', expected a list"),
    ("collections.news.languages", ["fi"], "collections.news.languages: 'fi', expected sw or de"),
    ("against", ["nothing"], "against: 'nothing', expected zeroshot or ot or switched"),
    ("translation", "bm25", "translation: 'bm25', expected zeroshot or ot or switched"),
    ("curves", {"c": ["zeroshot"]}, "curves.c: 'zeroshot', expected ot or switched"),
    ("passage_length", "long", "passage_length: 'long', expected int"),
    ("word_alignment", {"bitext": "b"}, "word_alignment: no key `lexicon` with a name or file"),
    ("note", "${NO_SUCH_VARIABLE}", "the environment variable NO_SUCH_VARIABLE is not set; set it"),
    ("arguments.max_steps", "many", "arguments.max_steps: 'many', expected int"),
    ("arms.ot.max_iter", 2.5, "arms.ot.max_iter: 2.5, expected int"),
    ("arms.ot.epsilon", "small", "arms.ot.epsilon: 'small', expected float"),
    ("arms.ot.epsilon", [1], "arms.ot.epsilon: [1], expected float"),
    ("arms.ot.epsilon", True, "arms.ot.epsilon: True, expected float"),
    ("arms.ot.bitext", [1], "arms.ot.bitext: [1], expected list[str]"),
    ("arguments.learning_rate", "fast", "arguments.learning_rate: 'fast', expected float"),
    ("arguments.learning_rate", "1 e-4", "arguments.learning_rate: '1 e-4', expected float"),
    (
        "arguments.learning_rate_mapping",
        {"a": "fast"},
        "arguments.learning_rate_mapping: {'a': 'fast'}, expected str or dict[str, float]",
    ),
    ("arguments.max_length", 2.5, "arguments.max_length: 2.5, expected int or dict[str, int]"),
    (
        "arms.ot.arguments",
        {"save_strategy": False},  # the `no` of YAML 1.1 without quotes
        "arms.ot.arguments.save_strategy: False, expected 'no' or 'steps' or 'epoch' or 'best'",
    ),
    ("teacher.arguments.optim", "adam", "teacher.arguments.optim: 'adam', expected 'adamw_torch'"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[f"{k}={v}" for k, v, _ in WRONG])
def test_errors_are_one_line_with_the_key(read, tmp_path, key, value, message):
    with pytest.raises(ValueError) as error:
        read(key, value)
    assert str(error.value).startswith(f"{tmp_path / 'study.yaml'}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"title: [a\nb: c\n", r"study\.yaml:\d: not YAML"),
        (b"a: b: c\n", r"study\.yaml:1: not YAML"),
        (b"\ttitle: a\n", r"study\.yaml:1: not YAML"),
        (b"- a\n- b\n", r"study\.yaml: expected keys and values, found list"),
        (b"", r"study\.yaml: expected keys and values, found nothing"),
        (b"title: a\nseeds: [0]\ntitle: b\n", r"study\.yaml:3: key `title` appears a second time"),
        (b"teacher: {model: a, model: b}\n", r"study\.yaml:1: key `model` appears a second time"),
        ("title: Müller\n".encode("latin-1"), r"study\.yaml:1: not UTF-8"),
    ],
)
def test_invalid_files_are_refused(tmp_path, data, message):
    path = tmp_path / "study.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert "\n" not in str(error.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.yaml: no such configuration file"):
        read_config(tmp_path / "no.yaml")


def test_nearest_name():
    assert nearest("epsilom", ["epsilon", "tol"]) == "; did you mean `epsilon`?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("zzz", []) == ""


def test_options_are_plain_data(read):
    config = read()
    assert json.dumps(config.teacher_trainer_args) and json.dumps(config.arms[1].options)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_valid(path, monkeypatch):
    monkeypatch.setenv("OPTICAL_DATA", "/data")
    assert read_config(path).arms


def test_the_model_of_the_multilingual_examples_is_a_variable(monkeypatch):
    path = EXAMPLES / "multilingual.yaml"
    monkeypatch.setenv("OPTICAL_DATA", "/data")
    monkeypatch.delenv("OPTICAL_MULTILINGUAL", raising=False)
    for expected in ("intfloat/multilingual-e5-small", "/models/other"):
        config = read_config(path)
        assert config.teacher_options.model == expected
        assert config.arm("dense").options["model"] == expected
        monkeypatch.setenv("OPTICAL_MULTILINGUAL", "/models/other")


def test_variables_may_have_a_default(read, monkeypatch):
    assert read("note", "in ${NO_SUCH_VARIABLE:-a - b} and ${LEXICA:-elsewhere}").note == (
        "in a - b and /lexica"
    )
    assert read("note", "${NO_SUCH_VARIABLE:-}").note == ""


def test_a_variable_alone_may_be_a_number_or_a_truth_value(read, monkeypatch):
    for text, value in (("true", True), ("false", False)):
        monkeypatch.setenv("STORE", text)
        assert read("store_teacher", "${STORE}").store_teacher is value
    assert read("store_teacher", "${NO_SUCH_VARIABLE:-true}").store_teacher is True
    monkeypatch.setenv("LENGTH", "64")
    assert read("passage_length", "${LENGTH}").passage_length == 64
    # Other text stays text, as does a variable inside a longer one.
    for text in ("no", "007", "1.", "maybe"):
        monkeypatch.setenv("NOTE", text)
        assert read("note", "${NOTE}").note == text
    assert read("note", "${LENGTH} words").note == "64 words"
    monkeypatch.setenv("STORE", "maybe")
    with pytest.raises(ValueError, match="store_teacher: 'maybe', expected"):
        read("store_teacher", "${STORE}")


def test_importing_the_configuration_loads_no_training_library():
    code = "import sys, optical.study.config; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"transformers", "sentence_transformers", "datasets", "matplotlib", "yaml"}
    assert not heavy & set(done.stdout.split())


def test_merged_keys_may_be_overridden():
    merged = parse_yaml("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}\nc: {<<: *a}\n", "f")
    assert merged["b"] == {"x": 2, "y": 1} and merged["c"] == merged["a"]
