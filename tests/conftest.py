"""Shared fixtures. Helpers are in ``optical.testing``: test modules cannot import each other."""

import json
import os
import random
import signal

import pytest
import torch

# TRITON_INTERPRET is read when kernels are decorated, so interpreted tests need their own process.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/interpreter"]


# A background process ignores SIGINT, which its child processes would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if "slow" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow: run with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill every uninitialised tensor with NaN, so that tests detect reads of its values."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(-77)

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))


# --- a tiny parallel corpus and tiny models for tests that train ---------------------------------

# Models are built here without network access; huggingface_hub reads this variable on import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WHO = [
    "teacher mwalimu Lehrer",
    "farmer mkulima Bauer",
    "doctor daktari Arzt",
    "child mtoto Kind",
    "mother mama Mutter",
    "driver dereva Fahrer",
]
VERBS = [
    "buys ananunua kauft",
    "sees anaona sieht",
    "carries anabeba trägt",
    "sells anauza verkauft",
]
WHAT = [
    "bread mkate Brot",
    "water maji Wasser",
    "fish samaki Fisch",
    "basket kikapu Korb",
    "book kitabu Buch",
    "lamp taa Lampe",
]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Write a tiny parallel corpus in English, Swahili and German with a test collection.

    The folder holds ``text/XX.txt``, ``bitext/en-XX.tsv``, ``lexicon/en-XX.tsv``,
    ``documents/XX.jsonl``, ``teacher.tsv``, ``queries.tsv`` and ``qrels.txt``. No training sentence
    is a document.
    """
    folder = tmp_path_factory.mktemp("world")
    for name in ("text", "bitext", "lexicon", "documents"):
        (folder / name).mkdir()
    scenes = [
        (i + j + k, [words.split() for words in (who, verb, what)])
        for i, who in enumerate(WHO)
        for j, verb in enumerate(VERBS)
        for k, what in enumerate(WHAT)
    ]
    # Shuffled, so that the first pairs of a file have different words.
    random.Random(0).shuffle(scenes)
    train = [words for number, words in scenes if number % 3]
    tested = [words for number, words in scenes if number % 3 == 0]

    def write(name, lines):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def sentence(words, column):
        who, verb, what = (word[column] for word in words)
        return [f"the {who} {verb} the {what}", f"{who} {verb} {what}", f"{what} {verb} {who}"][
            column
        ]

    for column, language in enumerate(("en", "sw", "de")):
        write(f"text/{language}.txt", [sentence(words, column) for words in train])
        write(
            f"documents/{language}.jsonl",
            [
                json.dumps({"id": f"d{i}", "text": sentence(words, column)}, ensure_ascii=False)
                for i, words in enumerate(tested)
            ],
        )
        if column:
            pairs = [f"{sentence(words, 0)}\t{sentence(words, column)}" for words in train]
            write(f"bitext/en-{language}.tsv", pairs)
            entries = [words.split() for words in (*WHO, *VERBS, *WHAT)]
            write(f"lexicon/en-{language}.tsv", [f"{w[0]}\t{w[column]}" for w in entries])
    write("teacher.tsv", [f"{w[0][0]} {w[2][0]}\t{sentence(w, 0)}" for w in train])
    asked = sorted({(words[0][0], words[2][0]) for words in tested})[::3]
    write("queries.tsv", [f"q{i}\t{who} {what}" for i, (who, what) in enumerate(asked)])
    judged = [
        f"q{i} 0 d{j} 1"
        for i, pair in enumerate(asked)
        for j, words in enumerate(tested)
        if (words[0][0], words[2][0]) == pair
    ]
    write("qrels.txt", judged)
    return folder


@pytest.fixture(scope="session")
def tiny_models(world, tmp_path_factory):
    """Train two encoders with different tokenizers, and a retriever; returns their folders.

    ``mixed`` reads all three languages with width 16, ``wide`` English and Swahili with width 24;
    ``teacher`` is an English retriever built from ``mixed``.
    """
    pytest.importorskip("sentence_transformers")
    from types import SimpleNamespace

    from transformers import TrainingArguments

    from optical.training import pretraining, recipes, runner

    folder = tmp_path_factory.mktemp("models")

    def make(name, width, units, text, bitext):
        options = pretraining.EncoderOptions(
            text=[str(world / f"text/{language}.txt") for language in text],
            bitext=[str(world / f"bitext/en-{language}.tsv") for language in bitext],
            vocabulary_size=units,
            hidden_size=width,
            layers=1,
            heads=2,
            max_tokens=24,
        )
        arguments = {"max_steps": 3, "report_to": "none", "disable_tqdm": True}
        args = TrainingArguments(str(folder / name), learning_rate=1e-2, **arguments)
        return str(runner.run(pretraining.encoder_trainer(options, args), options, resume=False))

    mixed = make("mixed", 16, 200, ("en", "sw", "de"), ("sw",))
    wide = make("wide", 24, 90, ("en", "sw"), ())
    options = recipes.TeacherOptions(
        model=mixed, pairs=[str(world / "teacher.tsv")], document_length=24
    )
    arguments = {"max_steps": 15, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    args = recipes.trainer_arguments(folder / "teacher", **arguments, disable_tqdm=True)
    teacher = runner.run(recipes.teacher(options, args), options, resume=False)
    return SimpleNamespace(mixed=mixed, wide=wide, teacher=str(teacher))
