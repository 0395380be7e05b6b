"""What the documentation shows is true: code runs, commands parse, links lead somewhere."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = r"[\d.]+(?:e[+-]\d+)?"
TARGET = r"\bmake ((?:test|check|study|bench|install|format|soak|fuzz|docs|dist|gpu)[\w-]*)"
ENGLISH = ["the book is old", "the house is big", "a child reads", "water is cold", "we eat bread"]
SWAHILI = ["kitabu ni cha zamani", "nyumba ni kubwa", "mtoto anasoma", "maji ni baridi", "tunakula"]


def blocks(page, kind):
    """(first line, text) of every fenced block whose fence says exactly ``kind``."""
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


class Made(tuple):
    """Stands in for a trainer."""

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
    """A folder that holds what the documentation takes for granted, on a small scale."""
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
    return folder


@pytest.mark.parametrize("code", CODE)
def test_code_runs(code, folder_of_examples, monkeypatch):
    monkeypatch.chdir(folder_of_examples)
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


def test_no_code_is_left_unrun():
    """A fence that says anything else than `python` would be passed over by the test above."""
    for page in PAGES:
        fences = re.findall(r"^ *```(py.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences) <= {"python"} and len(fences) == len(list(blocks(page, "python")))


@pytest.mark.parametrize(("name", "error"), [("method.md", 0.2), ("gradients.md", 0.3)])
def test_the_numbers_shown_are_those_printed(name, error):
    page = ROOT / "docs" / name
    (_, code), (_, shown) = next(blocks(page, "python")), next(blocks(page, "text"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, name, "exec"), {})
    texts = printed.getvalue(), shown
    found, expected = ([float(x) for x in re.findall(NUMBER, text)] for text in texts)
    # Percentages by their points, small errors by their size.
    tolerance = {"abs": error} if name == "method.md" else {"rel": error}
    assert found == pytest.approx(expected, **tolerance)


@pytest.mark.parametrize("words", COMMANDS)
def test_command_is_understood(words, monkeypatch, tmp_path):
    """Parsed by the real command line, which stops where the work would begin."""
    from optical.cli import main as cli

    monkeypatch.chdir(tmp_path)
    if words[0] != "train":
        cli.build_parser()[0].parse_args(words)
        return
    from optical.training import pretraining, recipes, runner, vocabulary_transfer

    for module, name in (
        (recipes, "teacher"),
        (recipes, "distill"),
        (recipes, "codeswitch"),
        (vocabulary_transfer, "transfer"),
        (recipes, "average"),
        (pretraining, "encoder_trainer"),
    ):
        monkeypatch.setattr(module, name, lambda options, args=None: Made((options, args)))
    made = []
    monkeypatch.setattr(runner, "run", lambda *args, **options: made.append(args[0]) or "done")
    monkeypatch.setattr(runner, "save", lambda _, *parts: made.append(parts) or "done")
    assert cli.main(words) == 0
    ((options, arguments),) = made
    for flag, value in itertools.pairwise(words):
        if flag.startswith("--") and not value.startswith("--"):
            holder = options if hasattr(options, flag[2:]) else arguments
            given = getattr(holder, flag[2:])
            assert value in (given if isinstance(given, list) else [str(given)])


def test_search_evaluate_compare_and_info_run(folder_of_examples, monkeypatch, capsys):
    from optical.cli import main as cli

    monkeypatch.chdir(folder_of_examples)
    names = ("search", "evaluate", "compare", "info")
    ran = [words[0] for words in commands(ROOT / "README.md") if words[0] in names
           and "--index" not in words and cli.main(words) == 0]  # fmt: skip
    assert ran == ["search", "search", "evaluate", "compare", "info"]
    assert (folder_of_examples / "ot.run").is_file()
    printed = capsys.readouterr().out
    assert "nDCG@10" in printed
    assert "self-test passed" in printed


def test_the_commands_of_the_readme_follow_one_another(world, tmp_path, monkeypatch):
    """All of the command line's section, in its order, with models that are small."""
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
    shown = [words for words in commands(ROOT / "README.md") if words[0] != "study"]
    for words in shown:
        if words[0] == "train":
            steps = [] if words[1] in WITHOUT_STEPS else ["--max_steps", "1", "--disable_tqdm", "true"]
            words = [*words, *steps, *small.get(words[1], [])]
        assert cli.main(words) == 0, words
    made = ("runs/average/final/model.safetensors", "ot.run", "index.run", "en-sw.align",
            "en-sw.lexicon.tsv", "runs/vectors/index.json", "figures/gap_per_arm.png")  # fmt: skip
    assert [name for name in made if not Path(name).is_file()] == []


def test_every_command_and_recipe_is_shown():
    from optical.cli import main as cli

    shown = commands(ROOT / "README.md")
    assert {words[0] for words in shown} == set(cli.build_parser()[1])
    assert {words[1] for words in shown if words[0] == "train"} == set(cli.RECIPES)


def test_every_option_of_every_recipe_is_described():
    from optical.training import options, recipes

    text = (ROOT / "docs" / "recipes.md").read_text()
    parts = re.split(r"^## (\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    kinds = {
        "teacher": recipes.TeacherOptions,
        "distill": recipes.DistillOptions,
        "codeswitch": recipes.CodeswitchOptions,
        "transfer": recipes.TransferOptions,
        "average": recipes.AverageOptions,
        "encoder": options.EncoderOptions,
    }
    assert set(sections) == set(kinds)
    for recipe, kind in kinds.items():
        rows = re.findall(r"^\| (`.*?) \|", sections[recipe], re.MULTILINE)
        described = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        inherited = {entry.name for entry in dataclasses.fields(recipes.TeacherOptions)}
        own = {entry.name for entry in dataclasses.fields(kind)}
        assert described == (own - inherited if recipe == "codeswitch" else own), recipe


def test_the_example_configuration_has_every_key(monkeypatch, tmp_path):
    import yaml

    from optical.study.arms import ArmConfig
    from optical.study.config import PLAIN_KEYS, STRUCTURED_KEYS, read_config

    monkeypatch.setenv("OPTICAL_DATA", "data")
    (_, text), *more = blocks(ROOT / "docs" / "study.md", "yaml")
    assert not more
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    config = read_config(path)
    trained = ["ot", "ot-1000", "codeswitch"]
    searched = ["zeroshot", "bm25", "bm25-table", "bm25-nmt"]
    assert sorted(arm.name for arm in config.arms) == sorted(trained + searched)
    assert all(isinstance(arm, ArmConfig) for arm in config.arms)
    for arm in config.arms:
        assert bool(arm.resolve_options("sw", "teacher", config)) == (arm.name in trained)
    assert set(yaml.safe_load(text)) == {*PLAIN_KEYS, *STRUCTURED_KEYS}


def test_shown_files_of_configuration_are_read(monkeypatch):
    from optical.study.config import read_config

    monkeypatch.setenv("OPTICAL_DATA", "data")
    configs = [words[1] for words in commands(ROOT / "README.md") if words[:1] == ["study"]
               and len(words) > 1]  # fmt: skip
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
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.is_file(), target
        # The site holds nothing else.
        assert page.parent.name != "docs" or page.parent in file.resolve().parents, target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The reference is made of docstrings, and every page is part of the site.
    assert "optical.sinkhorn_vectors" in (tmp_path / "api" / "index.html").read_text()
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= {path.parent.name for path in tmp_path.glob("*/index.html")}
    # MkDocs builds what the navigation leaves out, and warns of nothing.
    listed = re.findall(r"(\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted({*pages, "index"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_swallowed_as_html(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    shown = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not re.findall(r"<(?!!--|img |br>|a |/a>|p |/p>)/?\w[^>]*>", "\n".join(shown))


def test_the_results_block_is_marked():
    text = (ROOT / "README.md").read_text()
    assert 0 < text.index("<!-- results:begin -->") < text.index("<!-- results:end -->")
