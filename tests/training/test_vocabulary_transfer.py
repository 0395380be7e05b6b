"""Vocabulary transfer: initial input vectors of new units. Weight averaging of students."""

import copy

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from optical.cli import main as cli
from optical.io.files import read_json
from optical.models.fingerprint import fingerprints, partners, save_partners, set_partners
from optical.models.retriever import load_retriever
from optical.training import recipes, runner
from optical.training.options import AverageOptions, TransferOptions
from optical.training.vocabulary_transfer import transfer
from optical.training.weight_average import average

NOUNS = ("bread", "water", "fish", "basket", "book", "lamp", "teacher", "farmer", "doctor")


def transferred(world, teacher, folder, **options):
    options = TransferOptions(**{"model": teacher, "vocabulary_size": 400} | options)
    return load_retriever(
        runner.save(transfer(options), options, recipes.trainer_arguments(folder))
    )


@pytest.fixture(scope="module")
def models(world, tiny_models, tmp_path_factory):
    """Return the teacher, a student from spelling alone, and a student from bitext."""
    folder = tmp_path_factory.mktemp("transfer")
    text = [str(world / f"text/{language}.txt") for language in ("en", "sw", "de")]
    bitext = [str(world / f"bitext/en-{language}.tsv") for language in ("sw", "de")]
    return (
        load_retriever(tiny_models.teacher),
        transferred(world, tiny_models.teacher, folder / "spelt", text=text),
        transferred(world, tiny_models.teacher, folder / "paired", bitext=bitext),
    )


def vector(model, unit):
    weight = model[0].auto_model.get_input_embeddings().weight.detach()
    return weight[model.tokenizer.get_vocab()[unit]]


def mean(vectors):
    """Return the mean direction of vectors with their mean length."""
    return torch.nn.functional.normalize(vectors.mean(0), dim=0) * vectors.norm(dim=1).mean()


def test_transfer_changes_only_tokenizer_and_input_vectors(models):
    teacher, spelt, paired = models
    for student in (spelt, paired):
        before, after = dict(teacher.named_parameters()), dict(student.named_parameters())
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert len(changed) == 1 and "embeddings" in changed.pop()
        assert student[0].document_length == teacher[0].document_length == 24


def test_english_words_keep_their_vectors(models):
    teacher, spelt, paired = models
    for word in ("the", "fish", "[CLS]", "[PAD]"):
        torch.testing.assert_close(vector(spelt, word), vector(teacher, word))
    # No foreign sentence contains the word, so bitext has no evidence about it.
    torch.testing.assert_close(vector(paired, "the"), vector(teacher, "the"))


@pytest.mark.parametrize(("foreign", "english"), [("samaki", "fish"), ("mwalimu", "teacher")])
def test_units_from_bitext_start_near_their_translations(models, foreign, english):
    teacher, _, paired = models
    # Among nouns only: in these few sentences all words co-occur.
    nouns = [word for word in NOUNS if word in teacher.tokenizer.get_vocab()]
    weight = torch.stack([vector(teacher, word) for word in nouns])
    likeness = torch.cosine_similarity(weight, vector(paired, foreign))
    assert english in nouns and nouns[int(likeness.argmax())] == english


def test_initialization_from_spelling_alone(world, tiny_models, tmp_path):
    bitext = [str(world / "bitext/en-sw.tsv")]
    student = transferred(
        world, tiny_models.teacher, tmp_path / "spelt", bitext=bitext, initialize_from="spelling"
    )
    paired = transferred(world, tiny_models.teacher, tmp_path / "paired", bitext=bitext)
    assert student.tokenizer.get_vocab() == paired.tokenizer.get_vocab()
    teacher = load_retriever(tiny_models.teacher)
    weight = teacher[0].auto_model.get_input_embeddings().weight.detach()
    pieces = teacher.tokenizer("samaki", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(vector(student, "samaki"), mean(weight[pieces]))


def test_balance_repeats_small_files_for_the_vocabulary(world, tiny_models, tmp_path):
    (tmp_path / "rare.tsv").write_text("the fish\tzzyqx\n", encoding="utf-8")
    files = [str(world / "bitext/en-sw.tsv"), str(tmp_path / "rare.tsv")]
    units = [
        transferred(
            world,
            tiny_models.teacher,
            tmp_path / str(balance),
            bitext=files,
            balance=balance,
            vocabulary_size=100,
        ).tokenizer.tokenize("zzyqx")
        for balance in (False, True)
    ]
    assert len(units[0]) > 1 and units[1] == ["zzyqx"]


def test_max_pairs_limits_the_pairs_that_are_read(world, tiny_models, tmp_path):
    lines = (world / "bitext/en-sw.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    first = tmp_path / "first.tsv"
    first.write_text("".join(lines[:20]), encoding="utf-8")
    teacher, whole = tiny_models.teacher, world / "bitext/en-sw.tsv"
    made = [
        transferred(world, teacher, tmp_path / name, bitext=[str(path)], max_pairs=limit)
        for name, path, limit in (("whole", whole, 20), ("cut", first, None))
    ]
    units = [model[0].tokenizer.get_vocab() for model in made]
    assert units[0] == units[1]
    assert torch.equal(*(model[0].auto_model.get_input_embeddings().weight for model in made))
    with pytest.raises(ValueError, match="max_pairs: 0, expected 1 or more"):
        transferred(world, tiny_models.teacher, tmp_path / "none", bitext=[str(first)], max_pairs=0)


def test_kept_units_keep_their_segmentation_and_vectors(world, tiny_models, tmp_path):
    teacher = load_retriever(tiny_models.teacher)
    bitext = [str(world / "bitext/en-sw.tsv")]
    # With so few units, a new vocabulary alone would split both words into letters.
    student = transferred(
        world, tiny_models.teacher, tmp_path / "kept", bitext=bitext, vocabulary_size=60, keep=True
    )
    before, after = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    lower = {unit for unit in before if not unit.startswith("[")}
    assert lower <= after.keys() and len(after) == len({*after.values()})
    for word in ("fish", "[CLS]", "[PAD]"):
        assert student.tokenizer.tokenize(word) == [word]
        torch.testing.assert_close(vector(student, word), vector(teacher, word))


def test_a_prior_keeps_the_vectors_of_a_multilingual_retriever(world, tiny_models, tmp_path):
    """Without new units, vectors move from the retriever's own to those of the pairs."""
    teacher = load_retriever(tiny_models.teacher)
    bitext = [str(world / "bitext/en-sw.tsv")]
    moved = []
    for prior in (1e9, 10.0, 0.0):
        student = transferred(
            world,
            tiny_models.teacher,
            tmp_path / f"{prior}",
            bitext=bitext,
            vocabulary_size=0,
            keep=True,
            prior=prior,
        )
        assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
        assert student.tokenizer.tokenize("Samaki!") == teacher.tokenizer.tokenize("Samaki!")
        unit = "samaki" if "samaki" in teacher.tokenizer.get_vocab() else "mkate"
        moved.append(float((vector(student, unit) - vector(teacher, unit)).norm()))
        torch.testing.assert_close(vector(student, "the"), vector(teacher, "the"))
    assert moved[0] < 1e-4 < moved[1] < moved[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary_size": 0}, "vocabulary_size: 0, expected 1 or more"),
        ({"vocabulary_size": -1, "keep": True}, "vocabulary_size: -1, expected 0 or more"),
        ({"prior": -1.0}, "prior: -1.0, expected a number of at least 0"),
        ({"prior": float("nan")}, "prior: nan, expected a number of at least 0"),
    ],
)
def test_invalid_sizes_and_priors_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransferOptions(**{"model": "a", "text": ["b"]} | changes).validate()


def test_keep_refuses_other_tokenizer_models(world, tiny_models, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    teacher = load_retriever(tiny_models.teacher)
    known = teacher.tokenizer.get_vocab()
    names = {
        name: getattr(teacher.tokenizer, name)
        for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    teacher[0].processor = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(known, unk_token="[UNK]")), **names
    )
    teacher.save_pretrained(str(tmp_path / "words"))
    with pytest.raises(ValueError, match=r"keep: .* WordLevel, expected WordPiece, Unigram or BPE"):
        transferred(
            world,
            str(tmp_path / "words"),
            tmp_path / "out",
            bitext=[str(world / "bitext/en-sw.tsv")],
            keep=True,
        )


def test_unit_of_unknown_letters_gets_the_mean_vector(world, tiny_models, tmp_path):
    (tmp_path / "text.txt").write_text("ώώ ώώ ώώ\nthe fish\n" * 5, encoding="utf-8")
    teacher = load_retriever(tiny_models.teacher)
    student = transferred(
        world, tiny_models.teacher, tmp_path / "greek", text=[str(tmp_path / "text.txt")]
    )
    weight = teacher[0].auto_model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(vector(student, "ώώ"), mean(weight))


def test_distillation_starts_from_a_transferred_model(world, tiny_models, models, tmp_path):
    _, _, paired = models
    paired.save_pretrained(str(tmp_path / "start"))
    options = recipes.DistillOptions(
        teacher=tiny_models.teacher,
        student=str(tmp_path / "start"),
        bitext=[str(world / "bitext/en-sw.tsv")],
        role="document",
        max_iter=5,
    )
    args = recipes.trainer_arguments(
        tmp_path / "out", max_steps=2, per_device_train_batch_size=4, disable_tqdm=True
    )
    final = runner.run(recipes.distill(options, args), options, resume=False)
    student = load_retriever(final)
    assert len(student.tokenizer) == len(paired.tokenizer)
    assert not torch.equal(vector(student, "samaki"), vector(paired, "samaki"))


def averaged(folder, *models):
    options = AverageOptions(models=[str(model) for model in models])
    model = average(options)
    return load_retriever(runner.save(model, options, recipes.trainer_arguments(folder)))


def test_average_has_the_mean_of_all_weights(models, tmp_path):
    _, spelt, _ = models
    for name, factor in (("one", 1.0), ("three", 3.0), ("five", 5.0)):
        student = copy.deepcopy(spelt)
        with torch.no_grad():
            for value in student.parameters():
                value.mul_(factor)
        student.save_pretrained(str(tmp_path / name))
    found = averaged(tmp_path / "o", *(tmp_path / name for name in ("one", "three", "five")))
    expected = spelt.state_dict()
    learnt = dict(spelt.named_parameters())
    for name, value in found.state_dict().items():
        assert value.dtype == expected[name].dtype
        factor = 3.0 if name in learnt else 1.0
        torch.testing.assert_close(value, factor * expected[name])
    assert found.tokenizer.get_vocab() == spelt.tokenizer.get_vocab()


def test_the_teacher_and_its_student_average_to_a_partner_of_the_teacher(models, tmp_path):
    _, spelt, _ = models
    student = copy.deepcopy(spelt)
    with torch.no_grad():
        next(student.parameters()).mul_(2.0)
    spelt.save_pretrained(str(tmp_path / "teacher"))
    set_partners(student, fingerprints(spelt).values())
    student.save_pretrained(str(tmp_path / "student"))
    save_partners(student, tmp_path / "student")
    known = partners(averaged(tmp_path / "o", tmp_path / "teacher", tmp_path / "student"))
    assert set(known) == set(fingerprints(spelt).values())


def test_average_refuses_students_of_different_models(world, tiny_models, models, tmp_path):
    _, spelt, paired = models
    spelt.save_pretrained(str(tmp_path / "one"))
    paired.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"models: .*other has another vocabulary than .*one"):
        averaged(tmp_path / "o", tmp_path / "one", tmp_path / "other")
    for dimension in (8, 4):
        narrow = load_retriever(tiny_models.mixed, dimension=dimension)
        narrow.save_pretrained(str(tmp_path / str(dimension)))
    with pytest.raises(ValueError, match=r"models: .* of .*4 has the shape \(4, .*8, \(8, "):
        averaged(tmp_path / "o", tmp_path / "8", tmp_path / "4")
    with pytest.raises(ValueError, match=r"models: 1 given, expected two or more"):
        averaged(tmp_path / "o", tmp_path / "one")


def test_saving_refuses_a_folder_with_checkpoints(models, tmp_path):
    """A model without training steps does not overwrite a training."""
    _, spelt, _ = models
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/trainer_state.json").write_text("{}")
    args = recipes.trainer_arguments(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints"):
        runner.save(spelt, AverageOptions(), args)


def test_transfer_command(world, tiny_models, tmp_path, capsys):
    arguments = ["--model", tiny_models.teacher, "--vocabulary_size", "200"]
    arguments += ["--bitext", str(world / "bitext/en-sw.tsv"), "--output_dir", str(tmp_path / "o")]
    assert cli.main(["train", "transfer", *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "o/final")
    assert read_json(tmp_path / "o/run.json")["recipe"] == "transfer"
    assert cli.main(["train", "transfer", "--output_dir", str(tmp_path / "p")]) == 2
    assert "model: none given" in capsys.readouterr().err
    invalid = [*arguments[:-1], str(tmp_path / "q"), "--initialize_from", "letters"]
    assert cli.main(["train", "transfer", *invalid]) == 2
    assert "--initialize_from: invalid choice: 'letters'" in capsys.readouterr().err
