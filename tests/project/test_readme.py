"""The documentation: its code runs, its commands parse, its links resolve."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README, COMMAND_LINE = ROOT / "README.md", DOCS / "cli.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NUMBER = r"[\d.]+(?:e[+-]\d+)?"
TARGET = r"\bmake ((?:test|check|study|bench|install|format|soak|fuzz|docs|dist|gpu)[\w-]*)"
ENGLISH = ["the book is old", "the house is big", "a child reads", "water is cold", "we eat bread"]
SWAHILI = ["kitabu ni cha zamani", "nyumba ni kubwa", "mtoto anasoma", "maji ni baridi", "tunakula"]


def blocks(page, kind):
    """Yield (first line, text) of every fenced block of a kind."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if match[1] == kind:
            yield text[: match.start()].count("\n") + 2, match[2]


def shell_lines(page):
    for _, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def commands(page):
    return [words[1:] for words in shell_lines(page) if words[0] == "optical"]


class FakeTrainer(tuple):
    """The options and arguments that a recipe receives, in place of its trainer."""

    def add_callback(self, callback):
        pass


def named(items):
    return [pytest.param(item, id=f"{name}") for name, item in items]


CODE = [
    pytest.param(text, id=f"{page.name}:{line}")
    for page in PAGES
    for line, text in blocks(page, "python")
]
COMMANDS = named(
    (f"{p.name}: {' '.join(words)[:40]}", words) for p in PAGES for words in commands(p)
)


def tiny_encoder(folder, texts):
    from optical.models import tokenizers
    from optical.training import pretraining

    tokenizer = tokenizers.train_tokenizer(iter(texts), 100, 32)
    options = pretraining.EncoderOptions(hidden_size=16, layers=1, heads=2)
    pretraining.new_encoder(options, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder_of_examples(tmp_path_factory):
    """A folder with small versions of the files that the documentation assumes."""
    from optical.models.retriever import load_retriever

    folder = tmp_path_factory.mktemp("folder_of_examples")
    tiny_encoder(folder / "english", ENGLISH)
    tiny_encoder(folder / "swahili", SWAHILI)
    for source, name in (
        ("english", "teacher/final"),
        ("swahili", "student"),
        ("swahili", "sw/final"),
    ):
        load_retriever(folder / source).save_pretrained(str(folder / "runs" / name))

    def write(name, lines):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    pairs = list(zip(ENGLISH, SWAHILI, strict=True))
    write("en-sw.tsv", (f"{english}\t{other}" for english, other in pairs))
    write("queries.tsv", (f"q{i}\t{english}" for i, (english, _) in enumerate(pairs)))
    write(
        "documents.jsonl",
        (f'{{"id": "d{i}", "text": "{text}"}}' for i, (_, text) in enumerate(pairs)),
    )
    write("qrels.txt", (f"q{i} 0 d{i} 1" for i in range(len(pairs))))
    write("baseline.run", (f"q{i} Q0 d0 1 1.0 baseline" for i in range(len(pairs))))
    return folder


@pytest.mark.parametrize("code", CODE)
def test_code_runs(code, folder_of_examples, monkeypatch):
    monkeypatch.chdir(folder_of_examples)
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


def test_no_code_is_left_unrun():
    """Fences other than exactly `python` would escape the test above."""
    for page in PAGES:
        fences = re.findall(r"^ *```(py.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences) <= {"python"} and len(fences) == len(list(blocks(page, "python")))


@pytest.mark.parametrize(("name", "error"), [("method.md", 0.2), ("gradients.md", 0.3)])
def test_the_numbers_shown_are_those_printed(name, error):
    page = ROOT / "docs" / name
    line, shown = next(blocks(page, "text"))
    code = [text for start, text in blocks(page, "python") if start < line][-1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, name, "exec"), {})
    texts = printed.getvalue(), shown
    values, expected = ([float(x) for x in re.findall(NUMBER, text)] for text in texts)
    # Percentages by their points, small errors by their size.
    tolerance = {"abs": error} if name == "method.md" else {"rel": error}
    assert values == pytest.approx(expected, **tolerance)


@pytest.mark.parametrize("words", COMMANDS)
def test_command_is_understood(words, monkeypatch, tmp_path):
    """The real command line parses every command; training is replaced by a stub."""
    from optical.cli import main as cli

    monkeypatch.chdir(tmp_path)
    if words[0] != "train":
        cli.build_parser()[0].parse_args(words)
        return
    from optical.training import pretraining, recipes, runner, vocabulary_transfer, weight_average

    for module, name in (
        (recipes, "teacher"),
        (recipes, "distill"),
        (recipes, "codeswitch"),
        (vocabulary_transfer, "transfer"),
        (weight_average, "average"),
        (pretraining, "encoder_trainer"),
    ):
        monkeypatch.setattr(module, name, lambda options, args=None: FakeTrainer((options, args)))
    # The models and files of the examples do not exist.
    monkeypatch.setattr("optical.cli.train.check_training", lambda *arguments: None)
    ran = []
    monkeypatch.setattr(runner, "run", lambda *args, **options: ran.append(args[0]) or "done")
    monkeypatch.setattr(runner, "save", lambda _, *parts: ran.append(parts) or "done")
    assert cli.main(words) == 0
    ((options, arguments),) = ran
    for flag, value in itertools.pairwise(words):
        if flag.startswith("--") and not value.startswith("--"):
            holder = options if hasattr(options, flag[2:]) else arguments
            parsed = getattr(holder, flag[2:])
            assert value in (parsed if isinstance(parsed, list) else [str(parsed)])


def test_the_commands_of_the_readme_run(folder_of_examples, monkeypatch, capsys):
    """Every command of the README but the demonstration, in order."""
    from optical.cli import main as cli

    monkeypatch.chdir(folder_of_examples)
    shown = [words for words in commands(README) if words != ["study"]]
    for words in shown:
        if words[0] == "train":
            words = [*words, "--max_steps", "1", "--disable_tqdm", "true"]
        assert cli.main(words) == 0, words
    expected = ["info", "train", "search", "evaluate", "compare"]
    assert [words[0] for words in shown] == expected
    assert (folder_of_examples / "ot.run").is_file()
    printed = capsys.readouterr().out
    assert "nDCG@10" in printed
    assert "self-test passed" in printed


def test_the_commands_of_the_command_line_page_run(world, tmp_path, monkeypatch):
    """Every command of docs/cli.md but studies and their reports, in order, with small models."""
    from optical.cli import main as cli
    from optical.training.options import WITHOUT_STEPS

    monkeypatch.chdir(tmp_path)
    for source, name in (
        ("text/en.txt", "en.txt"), ("text/sw.txt", "sw.txt"), ("bitext/en-sw.tsv", "en-sw.tsv"),
        ("teacher.tsv", "pairs.tsv"), ("lexicon/en-sw.tsv", "lexicon.tsv"), ("qrels.txt",) * 2,
        ("queries.tsv",) * 2, ("queries.tsv", "queries.sw.tsv"),
        ("documents/sw.jsonl", "documents.jsonl"), ("documents/en.jsonl", "documents.en.jsonl"),
    ):  # fmt: skip
        shutil.copy(world / source, name)
    table = ROOT / "examples/results/clir_cpu/results.csv"
    (tmp_path / "runs/pack").mkdir(parents=True)
    shutil.copy(table, "runs/pack/results.csv")
    small = {"encoder": ["--hidden_size", "16", "--layers", "1"]}
    shown = [words for words in commands(COMMAND_LINE) if words[0] not in ("study", "report")]
    for words in shown:
        if words[0] == "train":
            steps = (
                [] if words[1] in WITHOUT_STEPS else ["--max_steps", "1", "--disable_tqdm", "true"]
            )
            words = [*words, *steps, *small.get(words[1], [])]
        if words[0] == "warmup":
            words = [*words, "--device", "cpu"]
        assert cli.main(words) == 0, words
    expected = (
        "runs/average/final/model.safetensors",
        "ot.run",
        "index.run",
        "en-sw.align",
        "en-sw.lexicon.tsv",
        "runs/vectors/index.json",
        "figures/gap_per_arm.pdf",
    )
    assert [name for name in expected if not Path(name).is_file()] == []


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


def test_every_command_and_recipe_is_shown():
    from optical.cli import main as cli

    shown = commands(COMMAND_LINE)
    assert {words[0] for words in shown} == set(cli.build_parser()[1])
    assert {words[1] for words in shown if words[0] == "train"} == set(cli.RECIPES)


def test_every_option_of_every_recipe_is_described():
    from optical.training import options

    text = (DOCS / "recipes.md").read_text()
    parts = re.split(r"^## (\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    kinds = {
        "teacher": options.TeacherOptions,
        "distill": options.DistillOptions,
        "codeswitch": options.CodeswitchOptions,
        "transfer": options.TransferOptions,
        "average": options.AverageOptions,
        "encoder": options.EncoderOptions,
    }
    assert set(sections) == set(kinds)
    for recipe, kind in kinds.items():
        rows = re.findall(r"^\| (`.*?) \|", sections[recipe], re.MULTILINE)
        described = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        inherited = {entry.name for entry in dataclasses.fields(options.TeacherOptions)}
        own = {entry.name for entry in dataclasses.fields(kind)}
        assert described == (own - inherited if recipe == "codeswitch" else own), recipe


def test_the_example_configuration_has_every_key(monkeypatch, tmp_path):
    import yaml

    from optical.study.arms import ArmConfig
    from optical.study.config import PLAIN_KEYS, STRUCTURED_KEYS, read_config

    monkeypatch.setenv("OPTICAL_DATA", "data")
    (_, text), *more = blocks(DOCS / "study.md", "yaml")
    assert not more
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    config = read_config(path)
    trained = ["ot", "ot-1000", "codeswitch"]
    searched = ["zeroshot", "e5", "bge", "late", "bm25", "bm25-table", "bm25-nmt"]
    assert sorted(arm.name for arm in config.arms) == sorted(trained + searched)
    assert all(isinstance(arm, ArmConfig) for arm in config.arms)
    for arm in config.arms:
        assert bool(arm.resolve_options("sw", "teacher", config)) == (arm.name in trained)
    assert set(yaml.safe_load(text)) == {*PLAIN_KEYS, *STRUCTURED_KEYS}


def test_shown_files_of_configuration_are_read(monkeypatch):
    from optical.study.config import read_config

    monkeypatch.setenv("OPTICAL_DATA", "data")
    shown = [words for page in PAGES for words in commands(page) if words[0] == "study"]
    configs = {words[1] for words in shown if len(words) > 1}
    for name in configs:
        read_config(ROOT / name)
    assert configs


def test_make_targets_and_extras_exist():
    tomllib = pytest.importorskip("tomllib")
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for page in PAGES:
        for target in re.findall(TARGET, page.read_text()):
            assert target in targets
        for words in shell_lines(page):
            for extras in re.findall(r"\[([\w,]+)\]", " ".join(words) if "pip" in words else ""):
                assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.is_file(), target
        # The site contains nothing outside docs/.
        assert DOCS not in page.parents or DOCS in file.resolve().parents, target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
            assert anchor in [re.sub(r" +", "-", text) for text in anchors], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_swallowed_as_html(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    shown = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not re.findall(r"<(?!!--|img |br>|a |/a>|p |/p>)/?\w[^>]*>", "\n".join(shown))


def test_numbers_of_the_readme_are_in_its_tables_or_on_the_pages():
    """MAP and times of the README's prose come from generated tables."""
    text = README.read_text(encoding="utf-8")
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    generated = re.findall(r"<!-- \w+:begin -->.*?<!-- \w+:end -->", text + results, re.DOTALL)
    prose = re.sub(r"<!-- \w+:begin -->.*?<!-- \w+:end -->|```.*?```", "", text, flags=re.DOTALL)
    tables = [*generated, (DOCS / "benchmarks.md").read_text(encoding="utf-8")]
    for number in re.findall(r"(?<![\w.])\.\d{3}|[\d.]+ ms|\d+ of \d+(?= comparisons)", prose):
        assert any(number in table for table in tables), number


@pytest.mark.parametrize(
    "page",
    [
        "CONTRIBUTING.md",
        "README.md",
        "csrc/README.md",
        "kernels/triton/README.md",
        "benchmarks/README.md",
    ],
)
def test_every_path_in_a_guide_exists(page):
    """Guides name files by their path in the repository, or within their own folder."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|h|cpp|cuh|cu|md|csv))`", text))
    assert names or page == "README.md"
    missing = [
        name
        for name in sorted(names)
        if not ((ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists())
    ]
    assert not missing
