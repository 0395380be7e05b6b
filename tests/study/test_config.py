"""A study's configuration: read whole, and every mistake said in one line before anything runs."""

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="needs the extra `study`")
pytest.importorskip("sentence_transformers", reason="needs the extra `study`")

import yaml
from transformers import HfArgumentParser

from optical.io.settings import nearest, parse_yaml
from optical.study.config import read_config
from optical.training.options import CodeswitchOptions, DistillOptions
from optical.training.recipes import CommandLineArguments

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
    """Read USUAL with a change: a dotted key and its value, None to remove it."""
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


def test_reads_everything(read, tmp_path):
    config = read()
    assert config.title == "study" and str(config.output) == "out" and config.role == "document"
    assert config.languages == ("sw", "de") and config.seeds == (0,)
    assert (config.resource("sw"), config.resource("de"), config.resource("fi")) == (
        "low",
        "high",
        "",
    )
    assert config.teacher_options.pairs == [str(tmp_path / "teacher.tsv")]
    # The arguments of a part add to the common ones.
    assert config.teacher_arguments == {"max_steps": 7, "learning_rate": 0.001}
    zeroshot, ot, switched = config.arms
    assert (zeroshot.recipe, zeroshot.encodes, ot.encodes, switched.encodes) == (
        "none",
        "both",
        "role",
        "both",
    )
    assert zeroshot.options("sw", "teacher", config) is None
    assert ot.options("sw", "teacher", config) == DistillOptions(
        teacher="teacher",
        role="document",
        epsilon=0.1,
        bitext=[str(tmp_path / "../bitext/en-sw.tsv")],
    )
    assert switched.options("de", "teacher", config) == CodeswitchOptions(
        model="teacher",
        sides="document",
        pairs=config.teacher_options.pairs,
        lexicon=["de=/lexica/en-de.tsv"],
    )
    assert (ot.arguments["max_steps"], switched.arguments["max_steps"]) == (5, 9)
    assert config.text == (tmp_path / "study.yaml").read_text()


def test_a_multilingual_arm_has_every_language(read, tmp_path):
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
    assert ot.options(both, "t", config).bitext == [
        str(tmp_path / f"../bitext/en-{language}.tsv") for language in both
    ]
    assert switched.options(both, "t", config).lexicon == [
        f"{language}=/lexica/en-{language}.tsv" for language in both
    ]
    made = more.options(both, "t", config, lexicon=lambda name, one: f"{name}.{one}")
    assert made.lexicon == ["sw=table.sw", "de=table.de", "de=own.tsv"]
    assert more.lexicons(config) == ["table"] and switched.lexicons(config) == []


def test_an_arm_may_start_elsewhere(read):
    config = read("arms.more", {"recipe": "teacher", "arguments": {"max_steps": 2}})
    more = config.arm("more")
    # A retriever of its own: the teacher's pairs and limits, from the encoder.
    assert (more.start, more.multilingual) == (("encoder",), True)
    assert more.arguments == {**config.teacher_arguments, "max_steps": 2}
    options = more.options("sw", "t", config, start=("e",))
    assert (options.model, options.pairs) == ("e", config.teacher_options.pairs)
    config = read("arms.more", {"recipe": "average", "start": ["ot", "switched"]})
    more = config.arm("more").options("sw", "t", config, start=("a", "b"))
    assert more.models == ["a", "b"]
    for start in ("ot", ["ot"], []):
        with pytest.raises(ValueError, match=r"arms.more.start: .*, expected two arms or more"):
            read("arms.more", {"recipe": "average", "start": start})
    with pytest.raises(ValueError, match=r"arms.more.start: 'teacher', expected ot or switched"):
        read("arms.more", {"recipe": "average", "start": ["ot", "teacher"]})
    config = read("arms.more", {"recipe": "distill", "bitext": "b", "start": "ot"})
    assert config.arm("more").options("sw", "t", config, start=("s",)).student == "s"
    with pytest.raises(ValueError, match=r"more is multilingual but starts from ot, which has a"):
        read("arms.more", {"recipe": "distill", "start": "ot", "multilingual": True})


def test_roles_belong_to_collections(read):
    config = read("collections.asked", {"source": "x", "role": "query"})
    assert config.roles == ["document", "query"]
    assert [config.role_of(name) for name in config.collections] == ["document", "query"]
    ot = config.arm("ot")
    assert ot.options("sw", "t", config, role="query").role == "query"
    assert config.arm("switched").options("sw", "t", config, role="query").sides == "query"


def test_a_table_read_off_an_arm_stands_behind_it(read, tmp_path):
    read("lexicons", {"plan": {"bitext": "b", "arm": "switched"}})
    path = tmp_path / "study.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["arms"]["switched"]["lexicon"] = "plan"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(ValueError, match="is read off the arm switched, which must stand before"):
        read_config(path)


def test_a_base_is_read_below(read, tmp_path):
    read()
    path = tmp_path / "more.yaml"
    path.write_text(
        "base: study.yaml\nseeds: [1, 2]\narguments: {max_steps: 9}\n"
        "arms: {ot: {epsilon: 0.3}, zeroshot: null}\n"
    )
    config = read_config(path)
    assert config.seeds == (1, 2) and config.languages == ("sw", "de")
    assert [arm.name for arm in config.arms] == ["ot", "switched"]
    assert config.arm("ot").settings["epsilon"] == 0.3 and config.arm("ot").settings["bitext"]
    assert config.arm("ot").arguments == {"max_steps": 9, "learning_rate": 0.001}
    assert "epsilon: 0.3" in config.text and "some/encoder" in config.text
    path.write_text("base: more.yaml\n")
    with pytest.raises(ValueError, match="is based on this file itself"):
        read_config(path)
    path.write_text("base: no.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"no\.yaml: no such configuration file"):
        read_config(path)


def test_output_of_the_command_line_wins(read, tmp_path):
    read()
    assert str(read_config(tmp_path / "study.yaml", "other").output) == "other"


def test_the_embedded_study(tmp_path):
    # The parser of the command line changes the types in the trainer's fields.
    HfArgumentParser((CommandLineArguments,), add_help=False)
    config = read_config(None, tmp_path / "out")
    assert config.phrasebook and len(config.languages) == 7
    assert config.teacher_options.pairs == [str(tmp_path / "out/data/teacher.tsv")]
    for arm in config.arms:
        options = arm.options("sw", "teacher", config)
        assert options is None or options.validate() is None


def test_yaml_reads_norwegian_as_false(read):
    assert read("languages", ["sw", "de", False]).languages == ("sw", "de", "no")


def test_numbers_may_be_written_without_a_point(read, tmp_path):
    read()
    path = tmp_path / "study.yaml"
    text = path.read_text().replace("epsilon: 0.1", "epsilon: 5e-2")
    text = text.replace("learning_rate: 0.001", "learning_rate: 1e-3")
    path.write_text(text)
    # YAML 1.1 reads 1e-3 as text.
    assert yaml.safe_load(text)["arguments"]["learning_rate"] == "1e-3"
    config = read_config(path)
    assert config.arms[1].settings["epsilon"] == 0.05
    assert config.arms[1].arguments["learning_rate"] == 0.001
    assert isinstance(config.arms[1].arguments["max_steps"], int)


@pytest.mark.parametrize("text", ["1e-4", "1E+5", "-3e2", "+1e0", ".5e1", "5.e-1", "12e03"])
def test_a_number_with_an_exponent_is_a_number(text):
    found = parse_yaml(f"a: {text}\nb: [{text}]\nc: {{d: {text}}}\n", "here")
    assert found == {"a": float(text), "b": [float(text)], "c": {"d": float(text)}}
    assert isinstance(found["a"], float)


@pytest.mark.parametrize("text", ["e1", "1e", "1e-", "1e4x", "'1e-4'", "1e-4.5", "v1e4"])
def test_what_only_looks_like_a_number_is_text(text):
    assert parse_yaml(f"a: {text}\n", "here") == {"a": text.strip("'")}


def test_yaml_outside_is_left_as_it_was():
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
    ("arms.ot.arguments", {"output_dir": "x"}, "unknown key `output_dir` in arms.ot.arguments"),
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
    ("arms.ot.multilingual", "yes", "arms.ot.multilingual: 'yes', expected bool"),
    ("arms.zeroshot.seeds", [1], "unknown key `seeds` in arms.zeroshot"),
    ("collections.news.role", "both", "collections.news.role: 'both', expected query or document"),
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
def test_a_mistake_is_said_in_one_line(read, tmp_path, key, value, message):
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
        (b"", r"study\.yaml: expected keys and values, found NoneType"),
        ("title: Müller\n".encode("latin-1"), r"study\.yaml:1: not UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, data, message):
    path = tmp_path / "study.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.yaml: no such configuration file"):
        read_config(tmp_path / "no.yaml")


def test_nearest():
    assert nearest("epsilom", ["epsilon", "tol"]) == "; did you mean `epsilon`?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("zzz", []) == ""


def test_the_resolved_options_are_plain_data(read):
    config = read()
    assert json.dumps(config.teacher_arguments) and json.dumps(config.arms[1].settings)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("clir_*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_understood(path, monkeypatch):
    monkeypatch.setenv("OPTICAL_DATA", "/data")
    assert read_config(path).arms
