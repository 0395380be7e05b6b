"""The training recipes: objectives, training texts, options, checkpoints and resuming."""

import dataclasses
import itertools
import json
import logging
import math
import random
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder, MultiVectorEncoderTrainer
from transformers import TrainerCallback

from optical.data.pairs import read_training_pairs
from optical.models.fingerprint import fingerprints, share_space
from optical.models.retriever import load_retriever
from optical.training import BitextCollator, recipes, runner
from optical.training.collator import LengthBatchSampler

STEPS = 6


@pytest.fixture
def distill(world, tiny_models, tmp_path):
    """Configure a short distillation; ``distill(folder, **args)`` returns trainer and options."""

    def make(folder="out", *, options=(), **arguments):
        settings = {
            "teacher": tiny_models.teacher,
            "student": tiny_models.wide,
            "bitext": [str(world / "bitext/en-sw.tsv")],
            "role": "document",
            **dict(options),
        }
        chosen = recipes.DistillOptions(**settings)
        usual = {
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        args = recipes.trainer_arguments(tmp_path / folder, **usual | arguments)
        return recipes.distill(chosen, args), chosen

    return make


def weights(folder):
    """Return every weight of a saved model, keyed by folder and name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{key}": value for key, value in load_file(path).items()}
    return found


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)


# --- distillation --------------------------------------------------------------------------------


def test_distillation_reduces_the_loss_of_the_student_only(distill, tmp_path):
    trainer, options = distill(max_steps=15)
    student, teacher = trainer.model, trainer.loss.teacher
    assert student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    final = runner.run(trainer, options, resume=False)

    history = losses(trainer)
    assert len(history) == 15 and history[-1] < 0.8 * history[0]
    # The cost is also logged under its own name.
    assert any("ot_cost" in name for entry in trainer.state.log_history for name in entry)
    assert not teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())

    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(parameter.requires_grad for parameter in optimized)
    # Input vectors of subwords that do not occur are frozen.
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert {id(p) for p in optimized} == {id(p) for p in trained.values()}
    frozen = {name for name, _ in student.named_parameters()} - set(trained)
    assert {name.rpartition(".")[2] for name in frozen} == {"table"}, frozen
    assert not {id(p) for p in optimized} & {id(p) for p in teacher.parameters()}

    # The saved model has no class of this package and no part of the teacher.
    assert final == tmp_path / "out/final"
    modules = json.loads((final / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    reloaded = MultiVectorEncoder(str(final))
    assert reloaded.get_embedding_dimension() == 16
    assert_same(dict(reloaded.state_dict()), dict(student.state_dict()))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]

    card = (final / "README.md").read_text(encoding="utf-8")
    assert "huang2023optical" in card and "ot, epsilon 0.05" in card

    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["recipe"] == "distill"
    assert run["options"] == dataclasses.asdict(options)
    assert run["arguments"]["max_steps"] == 15 and run["arguments"]["seed"] == 42
    assert run["arguments"]["learning_rate"] == 1e-2
    assert run["versions"]["torch"] == torch.__version__
    assert run["python"] and run["commit"]


class Stop(TrainerCallback):
    """Raise KeyboardInterrupt after a number of steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            raise KeyboardInterrupt


def with_dropout(folder, target):
    """Copy an encoder with dropout, so that training draws random numbers."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"embedding_dropout": 0.1, "mlp_dropout": 0.1}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.parametrize("damage", ["none", "missing", "torn", "one bit"])
def test_resumed_training_equals_an_uninterrupted_one(
    distill, tiny_models, tmp_path, damage, caplog
):
    options = {"student": with_dropout(tiny_models.wide, tmp_path / "student")}
    arguments = {"save_steps": 2, "save_total_limit": 2, "options": options}
    trainer, chosen = distill("whole", **arguments)
    expected = weights(runner.run(trainer, chosen, resume=False))

    stopped, chosen = distill("parts", **arguments)
    stopped.add_callback(Stop(5))
    with pytest.raises(KeyboardInterrupt):
        runner.run(stopped, chosen, resume=False)
    folder = tmp_path / "parts"
    assert not (folder / "final").exists()
    newest = folder / "checkpoint-4"
    if damage == "missing":
        (newest / "trainer_state.json").unlink()
    elif damage == "torn":
        state = newest / "trainer_state.json"
        state.write_text(state.read_text()[:100])
    elif damage == "one bit":
        data = bytearray((newest / "optimizer.pt").read_bytes())
        data[len(data) // 2] ^= 1
        (newest / "optimizer.pt").write_bytes(data)

    again, chosen = distill("parts", **arguments)
    first = []
    again.add_callback(Seen(first))
    with caplog.at_level(logging.WARNING, "optical"):
        found = weights(runner.run(again, chosen, resume=True))
    assert first == ([4] if damage == "none" else [2])
    torn = "checkpoint-4 is incomplete and is removed" in caplog.text
    changed = "optimizer.pt is damaged; the checkpoint is removed" in caplog.text
    assert (torn, changed) == (damage in ("missing", "torn"), damage == "one bit")
    assert_same(found, expected)
    assert losses(again) == pytest.approx(losses(trainer), abs=1e-6)


class Seen(TrainerCallback):
    """Record the step from which a training continues."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_a_resumed_training_has_the_data_options_and_models_of_its_checkpoints(
    distill, world, tiny_models, tmp_path, caplog
):
    bitext = tmp_path / "bitext.tsv"
    shutil.copy(world / "bitext/en-sw.tsv", bitext)
    student = tmp_path / "student"
    shutil.copytree(tiny_models.wide, student)

    def make(max_steps=2, **options):
        options = {"bitext": [str(bitext)], "student": str(student), **options}
        return distill(max_steps=max_steps, options=options)

    runner.run(*make(), resume=False)
    for changed, name in (
        ({"role": "query"}, "role was document, now query"),
        ({"objective": "greedy"}, "objective was the default, now greedy"),
        ({"student": tiny_models.mixed}, "starting_model was"),
        ({"teacher": tiny_models.mixed}, "(starting_model|teacher) was"),
        ({"bitext": [str(world / "bitext/en-de.tsv")]}, "bitext was"),
    ):
        with pytest.raises(ValueError, match=f"checkpoints of another training: {name}"):
            runner.run(*make(**changed), resume=True)
    # The content of a file counts, not its name; a longer training is told, not refused.
    shutil.move(bitext, tmp_path / "moved.tsv")
    longer = make(bitext=[str(tmp_path / "moved.tsv")], max_steps=3, max_iter=20)
    with caplog.at_level(logging.WARNING, "optical"):
        runner.run(*longer, resume=True)
    assert "continues with max_iter 20 (was the default), max_steps 3 (was 2)" in caplog.text
    shutil.copy(world / "bitext/en-de.tsv", bitext)
    with pytest.raises(ValueError, match="checkpoints of another training: bitext was"):
        runner.run(*make(), resume=True)


def test_a_saved_model_holds_no_pickle(distill, tmp_path):
    final = runner.run(*distill(max_steps=1), resume=False)
    assert not [path for path in final.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_students_record_their_teacher(distill, tiny_models, tmp_path):
    teacher = load_retriever(tiny_models.teacher)
    final = runner.run(*distill(max_steps=1, save_steps=1), resume=False)
    for folder in (final, tmp_path / "out/checkpoint-1"):
        assert share_space(load_retriever(folder), fingerprints(teacher)["document"], ())


def test_resuming_a_finished_training_changes_nothing(distill, tmp_path):
    trainer, options = distill(max_steps=2)
    expected = weights(runner.run(trainer, options, resume=False))
    trainer, options = distill(max_steps=2)
    assert_same(weights(runner.run(trainer, options, resume=True)), expected)
    # Without resume, existing checkpoints are refused.
    trainer, options = distill(max_steps=2)
    with pytest.raises(ValueError, match="holds checkpoints; add --resume to continue, or choose"):
        runner.run(trainer, options, resume=False)
    assert_same(weights(tmp_path / "out/final"), expected)


def test_last_checkpoint(tmp_path):
    assert runner.last_checkpoint(tmp_path) is None
    assert runner.last_checkpoint(tmp_path / "nothing") is None
    for name, state in (("9", "{}"), ("100", "{}"), ("200", ""), ("best", "{}")):
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-300").mkdir()
    assert runner.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    left = {"checkpoint-9", "checkpoint-100", "checkpoint-best"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_gradient_accumulation_equals_a_larger_batch(distill):
    plain = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 2}
    found = []
    for size, parts in ((8, 1), (4, 2)):
        trainer, options = distill(
            f"by{parts}",
            **plain,
            warmup_steps=0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
        )
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        found.append((weights(runner.run(trainer, options, resume=False)), losses(trainer)))
        moved = [
            (value - start[name]).abs().max() for name, value in trainer.model.state_dict().items()
        ]
        assert max(moved) > 1e-3
    assert_same(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-4)


def test_mixed_precision_keeps_float32_weights(distill):
    trainer, options = distill(bf16=True, max_steps=3)
    assert trainer.args.bf16
    final = runner.run(trainer, options, resume=False)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert {value.dtype for value in weights(final).values()} == {torch.float32}


def test_seed_determines_the_weights(distill):
    runs = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer, options = distill(folder, seed=seed, max_steps=2)
        runs.append(weights(runner.run(trainer, options, resume=False)))
    assert_same(runs[1], runs[0])
    assert any((runs[2][key] - value).abs().max() > 1e-4 for key, value in runs[0].items())


def test_student_starts_from_the_teacher(distill):
    trainer, _ = distill(options={"student": "", "max_pairs": 5})
    assert trainer.model is not trainer.loss.teacher
    assert_same(dict(trainer.model.state_dict()), dict(trainer.loss.teacher.state_dict()))
    assert len(trainer.train_dataset) == 5


def test_balance_repeats_pairs_of_smaller_files(distill, tmp_path):
    (tmp_path / "small.tsv").write_text("one\tmoja\ntwo\tmbili\n")
    (tmp_path / "large.tsv").write_text("".join(f"{i}\tnamba {i}\n" for i in range(5)))
    bitext = [str(tmp_path / "small.tsv"), str(tmp_path / "large.tsv")]
    trainer, _ = distill(options={"bitext": bitext, "balance": True})
    sources = list(trainer.train_dataset["source"])
    assert sources == ["one", "two", "one", "two", "one", *"01234"]
    assert list(trainer.train_dataset["target"])[4:6] == ["moja", "namba 0"]


def test_joined_pairs_are_passages_of_neighbouring_sentences(distill, tmp_path):
    pairs = ["one\tmoja", "two\tmbili", "three\ttatu na nyingine", "four\tnne"]
    (tmp_path / "few.tsv").write_text("".join(f"{pair}\n" for pair in pairs))
    bitext = {"bitext": [str(tmp_path / "few.tsv")]}
    trainer, _ = distill(options=bitext | {"join_characters": 10})
    # The third sentence is longer than ten characters.
    assert list(trainer.train_dataset["source"]) == ["one two", "three", "four"]
    assert list(trainer.train_dataset["target"]) == ["moja mbili", "tatu na nyingine", "nne"]
    trainer, _ = distill(options=bitext | {"join_characters": 10, "max_pairs": 1})
    assert list(trainer.train_dataset["source"]) == ["one"]


def test_grouped_batches_hold_sentences_of_similar_length(distill, tmp_path):
    lengths = list(range(1, 201))
    random.Random(0).shuffle(lengths)
    bitext = tmp_path / "lengths.tsv"
    bitext.write_text("".join(f"one {n}\t{'a' * n}\n" for n in lengths))
    options = {"bitext": [str(bitext)], "group_by_length": True}
    trainer, chosen = distill(options=options, max_steps=2, per_device_train_batch_size=3)
    dataset = trainer.train_dataset
    sampler = LengthBatchSampler(dataset, batch_size=3, drop_last=False, seed=1)
    epochs = []
    for epoch in (0, 0, 1):
        sampler.set_epoch(epoch)
        epochs.append([[len(dataset["target"][row]) for row in batch] for batch in sampler])
        # In random batches of three the mean spread is about 100.
        assert sum(max(batch) - min(batch) for batch in epochs[-1]) < 10 * len(epochs[-1])
        assert sorted(itertools.chain(*epochs[-1])) == sorted(lengths)
        assert len(sampler) == len(epochs[-1]) == 67
    assert epochs[0] == epochs[1] != epochs[2]
    assert [batch[0] for batch in epochs[0]] != sorted(batch[0] for batch in epochs[0])
    full = LengthBatchSampler(dataset, batch_size=3, drop_last=True, seed=1)
    assert {len(batch) for batch in full} == {3} and len(list(full)) == len(full) == 66
    runner.run(trainer, chosen, resume=False)
    assert type(trainer.get_train_dataloader().batch_sampler).__name__ == "LengthBatchSampler"


def test_student_of_another_dimension_is_refused(distill, tiny_models, tmp_path):
    load_retriever(tiny_models.wide).save_pretrained(str(tmp_path / "student"))
    with pytest.raises(ValueError, match="size 16, the student of size 24; give the student a Den"):
        distill(options={"student": str(tmp_path / "student")})
    with pytest.raises(ValueError, match="size 16, the student of size 8"):
        distill(options={"dimension": 8})


def test_unwritable_output_folder_is_refused(distill, tmp_path):
    trainer, options = distill("out")
    (tmp_path / "out").rmdir()  # created by the trainer
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match=r"output folder .*out cannot be written .*choose another"):
        runner.run(trainer, options, resume=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": ""}, "teacher: none given; expected a Hugging Face name or a folder"),
        ({"role": ""}, "role: '', expected query or document"),
        ({"objective": "mse"}, "objective: 'mse', expected ot"),
        ({"bitext": []}, "bitext: none given"),
        ({"epsilon": 0.0}, "epsilon is 0.0; expected a finite number > 0"),
        ({"epsilon": "small"}, "epsilon is a str; expected a float"),
        ({"max_iter": -1}, "max_iter is -1"),
        ({"gradient": "none"}, "gradient: 'none', expected envelope or"),
        (
            {"objective": "contrastive", "group_by_length": True},
            "group_by_length: given, but the objective 'contrastive' needs batches without",
        ),
        ({"stream": True, "group_by_length": True}, "group_by_length: True, expected False, bec"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
        ({"max_pairs": 0}, "max_pairs: 0, expected 1 or more"),
        ({"join_characters": -1}, "join_characters: -1, expected 0 or more"),
        ({"stream": True, "join_characters": 9}, "join_characters: 9, expected 0, because"),
    ],
)
def test_invalid_options_of_distillation(change, message):
    usual = {"teacher": "a", "bitext": ["b"], "role": "query"}
    with pytest.raises((ValueError, TypeError), match=message):
        recipes.DistillOptions(**usual | change).validate()


# --- trainer arguments and collator --------------------------------------------------------------


def test_invalid_trainer_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^learning_rate: 'fast', expected float"):
        recipes.trainer_arguments(tmp_path, learning_rate="fast")
    with pytest.raises(ValueError, match=r"^lr_scheduler_type: 'fast', expected 'linear' or "):
        recipes.trainer_arguments(tmp_path, lr_scheduler_type="fast")
    with pytest.raises(ValueError, match="'learning_rat' is unknown; did you mean `learning_rate`"):
        recipes.trainer_arguments(tmp_path, learning_rat=1.0)


@pytest.fixture
def collate(tiny_models):
    model = load_retriever(tiny_models.teacher)
    other = load_retriever(tiny_models.teacher)

    def call(row, **options):
        return BitextCollator(model, other, role="document", **options)([row, row])

    return call


@pytest.mark.parametrize("name", ["lang", "id", "sentence_id", "source_lang", "domain", "url"])
def test_metadata_is_not_read_as_a_sentence(collate, name):
    row = {name: "sw", "source": "the fish", "target": "samaki"}
    with pytest.raises(ValueError, match=f"column '{name}' would be read as a text; remove it"):
        collate(row)
    batch = collate(row, columns=["source", "target"])
    assert {key.split("_")[0] for key in batch} == {"source", "target"}


def test_columns_that_are_no_text_are_named(collate, caplog):
    with caplog.at_level(logging.INFO, "optical"):
        batch = collate({"source": "the fish", "target": "samaki", "score": 0.5})
    assert "the teacher reads source, the student target; score is not read" in caplog.text
    assert not [key for key in batch if key.startswith("score")]
    with pytest.raises(ValueError, match="column 'cosine' holds float, expected text"):
        collate({"source": "the fish", "target": "samaki", "cosine": 0.5})
    with pytest.raises(ValueError, match="column 'target' holds NoneType, expected text"):
        collate({"source": "the fish", "target": None})
    with pytest.raises(ValueError, match=r"columns source of source: expected two or more"):
        collate({"source": "the fish"})
    with pytest.raises(ValueError, match=r"columns source, sw of source, target: expected"):
        collate({"source": "the fish", "target": "samaki"}, columns=["source", "sw"])


def test_a_forgotten_collator_is_refused(distill, tmp_path):
    trainer, _ = distill()
    forgotten = MultiVectorEncoderTrainer(
        model=trainer.model,
        args=recipes.trainer_arguments(tmp_path / "forgotten", max_steps=1, disable_tqdm=True),
        train_dataset=trainer.train_dataset,
        loss=trainer.loss,
    )
    with pytest.raises(ValueError, match=r"roles document, query; .* give the trainer data_coll"):
        forgotten.train()


def test_prompts_of_the_trainer_are_used_or_refused(distill, world, tiny_models, tmp_path):
    prompts = {"query": "query: ", "document": "passage: "}
    with pytest.raises(ValueError, match="prompts: given, but bitext is read with the models"):
        distill(prompts=prompts)
    options = recipes.TeacherOptions(model=tiny_models.mixed, pairs=[str(world / "teacher.tsv")])
    arguments = {"max_steps": 1, "disable_tqdm": True}
    with pytest.raises(ValueError, match="expected those of the roles"):
        recipes.teacher(
            options, recipes.trainer_arguments(tmp_path, prompts={"positive": "x"}, **arguments)
        )
    args = recipes.trainer_arguments(tmp_path / "prompts", prompts=prompts, **arguments)
    trainer = recipes.teacher(options, args)
    row = trainer.train_dataset[0]
    batch = trainer.data_collator([row])
    read = trainer.model.tokenizer.decode(batch["positive_input_ids"][0])
    assert "passage :" in read or "passage:" in read or "[UNK]" in read
    plain = trainer.model.preprocess([row["positive"]], task="document")["input_ids"]
    assert batch["positive_input_ids"].shape[1] > plain.shape[1]
    # The model encodes as it was trained.
    assert load_retriever(runner.run(trainer, options, resume=False)).prompts == prompts


def test_negatives_that_are_left_out_are_counted(tmp_path, caplog):
    lines = [{"query": f"q{i}", "pos": ["p"], "neg": ["n1", "n2"]} for i in range(5)]
    lines += [{"query": "q", "pos": ["p"], "neg": []}, {"query": "q", "pos": []}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    rows = read_training_pairs([str(path)])
    assert [len(row) for row in rows] == [2] * 6
    assert "1 of 6 rows have only 0 negatives, so 10 negatives of the other rows" in caplog.text
    assert "a.jsonl: left out 1 lines with an empty `pos`" in caplog.text
    path.write_text(json.dumps({"query": "", "pos": ["p"]}))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected JSON .* and no empty text"):
        read_training_pairs([str(path)])


def test_collator_tokenises_for_each_model(tiny_models):
    teacher = load_retriever(tiny_models.mixed, query_length=5, document_length=9)
    student = load_retriever(tiny_models.wide, query_length=6, document_length=10)
    rows = [{"source": "water " * 20, "target": "maji " * 20, "other": "samaki"}] * 2
    for role, lengths in (("query", (5, 6)), ("document", (9, 10))):
        batch = BitextCollator(student, teacher, role=role)(rows)
        assert batch["source_task"] == batch["target_task"] == batch["other_task"] == role
        assert (batch["source_input_ids"].shape, batch["target_input_ids"].shape) == (
            (2, lengths[0]),
            (2, lengths[1]),
        )
        for column, model, text in (("source", teacher, "water"), ("target", student, "maji")):
            decoded = model.tokenizer.decode(batch[f"{column}_input_ids"][0])
            assert decoded.startswith(f"[CLS] {text} ")
    short = BitextCollator(student, teacher, role="document", max_length=4)(rows)
    assert short["source_input_ids"].shape == short["target_input_ids"].shape == (2, 4)
    with pytest.raises(ValueError, match="role: 'passage', expected 'query' or 'document'"):
        BitextCollator(student, teacher, role="passage")


def test_prompts_and_expansion_follow_the_role(tiny_models):
    teacher = load_retriever(tiny_models.mixed, query_length=8, query_expansion=True)
    student = load_retriever(tiny_models.wide, query_length=8, query_expansion=True)
    teacher.prompts = {"query": "water: ", "document": "fish: "}
    batch = BitextCollator(student, teacher, role="query")([{"a": "book", "b": "kitabu"}])
    for column, model in (("a", teacher), ("b", student)):
        assert batch[f"{column}_input_ids"].shape == (1, 8)
        assert model.tokenizer.mask_token_id in batch[f"{column}_input_ids"]
    assert "water" in teacher.tokenizer.decode(batch["a_input_ids"][0])
    assert "water" not in student.tokenizer.decode(batch["b_input_ids"][0])


def test_distillation_of_queries(distill):
    trainer, options = distill(options={"role": "query"}, max_steps=2)
    runner.run(trainer, options, resume=False)
    assert trainer.data_collator.role == "query" and len(losses(trainer)) == 2


# --- the contrastive recipes ---------------------------------------------------------------------


@pytest.fixture
def pairs(world):
    return [str(world / "teacher.tsv")]


def recipe(name, folder, **options):
    kinds = {"teacher": recipes.TeacherOptions, "codeswitch": recipes.CodeswitchOptions}
    chosen = kinds[name](**options)
    args = recipes.trainer_arguments(
        folder, max_steps=2, per_device_train_batch_size=8, disable_tqdm=True, seed=5
    )
    return getattr(recipes, name)(chosen, args), chosen


def test_teacher_recipe_saves_its_options(tiny_models, pairs, tmp_path):
    trainer, options = recipe(
        "teacher",
        tmp_path / "out",
        model=tiny_models.mixed,
        pairs=pairs,
        dimension=8,
        query_length=7,
        document_length=11,
        skip_frequent=1,
    )
    model = MultiVectorEncoder(str(runner.run(trainer, options, resume=False)))
    assert model.get_embedding_dimension() == 8
    query = model.encode_query(["the book " * 9], output_value=None, show_progress_bar=False)[0]
    document = model.encode_document(["the book " * 9], output_value=None, show_progress_bar=False)
    assert query["input_ids"].shape == (7,) and document[0]["input_ids"].shape == (11,)
    # The most frequent token of the training texts is `the`.
    the = model.tokenizer.convert_tokens_to_ids("the")
    assert torch.equal(query["attention_mask"].bool(), query["input_ids"] != the)
    card = (tmp_path / "out/final/README.md").read_text()
    assert "trained on pairs of queries and passages" in card and "`teacher.tsv`" in card
    assert json.loads((tmp_path / "out/run.json").read_text())["recipe"] == "teacher"


def test_no_passage_occurs_twice_in_a_batch(tiny_models, world, tmp_path):
    lines = (world / "teacher.tsv").read_text().splitlines()[:4] * 6
    (tmp_path / "double.tsv").write_text("\n".join(lines))
    trainer, _ = recipe(
        "teacher", tmp_path / "out", model=tiny_models.mixed, pairs=[str(tmp_path / "double.tsv")]
    )
    for batch in trainer.get_train_dataloader():
        ids = batch["positive_input_ids"].tolist()
        assert len({tuple(row) for row in ids}) == len(ids) <= 4


def test_codeswitching_replaces_words_of_the_chosen_role(
    tiny_models, pairs, world, tmp_path, caplog
):
    lexicon = world / "lexicon/en-sw.tsv"
    swahili = {line.split("\t")[1] for line in lexicon.read_text().splitlines()}
    plain = read_training_pairs(pairs)

    def rows(**options):
        options = {"lexicon": [f"sw={lexicon}"], "probability": 1.0, **options}
        trainer, _ = recipe(
            "codeswitch", tmp_path / "out", model=tiny_models.mixed, pairs=pairs, **options
        )
        return [tuple(row.values()) for row in trainer.train_dataset]

    with caplog.at_level(logging.INFO, "optical"):
        switched = rows()
    # `the`, two of five words, is in no lexicon.
    assert "the lexicons contain 60 % of the words" in caplog.text
    for (query, passage), (old_query, old_passage) in zip(switched, plain, strict=True):
        assert query == old_query
        words = passage.split()
        assert words[0] == words[3] == "the" and set(words) - {"the"} <= swahili
        assert passage != old_passage

    for (query, passage), (_, old_passage) in zip(rows(role="query"), plain, strict=True):
        assert set(query.split()) <= swahili and passage == old_passage
    both = rows(role="both")
    assert all(set((q + " " + p).split()) - {"the"} <= swahili for q, p in both)
    half = rows(probability=0.5, copies=2)
    assert len(half) == 2 * len(plain) and half[: len(plain)] != half[len(plain) :]
    assert half == rows(probability=0.5, copies=2)
    german = world / "lexicon/en-de.tsv"
    mixed = rows(lexicon=[f"sw={lexicon}", f"de={german}"])
    words = {word for _, passage in mixed for word in passage.split()}
    assert words & swahili and words - swahili - {"the"}


def test_codeswitching_trains(tiny_models, pairs, world, tmp_path):
    trainer, options = recipe(
        "codeswitch",
        tmp_path / "out",
        model=tiny_models.teacher,
        pairs=pairs,
        lexicon=[f"sw={world / 'lexicon/en-sw.tsv'}"],
    )
    assert MultiVectorEncoder(str(runner.run(trainer, options, resume=False)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model: none given"),
        ({"pairs": []}, "pairs: none given; expected --pairs, or --queries with --passages"),
        ({"queries": "q.tsv"}, "queries, passages: only one is given, expected both or neither"),
        ({"lexicon": []}, "lexicon: none given; expected at least one `language=file`"),
        ({"lexicon": ["en-sw.tsv"]}, "lexicon: 'en-sw.tsv', expected `language=file`"),
        ({"role": "passage"}, "role: 'passage', expected query or document or both"),
        ({"copies": 0}, "copies: 0, expected 1 or more"),
        ({"probability": 2.0}, "probability: 2.0, expected a number from 0 to 1"),
    ],
)
def test_invalid_options_of_codeswitching(change, message):
    usual = {"model": "a", "pairs": ["b"], "lexicon": ["sw=c"]}
    with pytest.raises(ValueError, match=message):
        recipes.CodeswitchOptions(**usual | change).validate()


# --- training pairs ------------------------------------------------------------------------------


def test_training_pairs_are_read(tmp_path):
    (tmp_path / "a.tsv").write_text("q1\tp1\n\nq2\tp2\tn2\n", encoding="utf-8")
    assert read_training_pairs([str(tmp_path / "a.tsv")]) == [("q1", "p1"), ("q2", "p2")]
    rows = [
        {"query": "q1", "pos": ["p1", "p2"], "neg": ["n1", "n2"]},
        {"query": "q2", "pos": ["p3"], "neg": ["n3"]},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    expected = [("q1", "p1", "n1"), ("q1", "p2", "n1"), ("q2", "p3", "n3")]
    assert read_training_pairs([str(tmp_path / "b.jsonl")]) == expected
    (tmp_path / "queries.tsv").write_text("7\td1\twater\n8\td2\tfish\n")
    (tmp_path / "passages.jsonl").write_text(
        '{"id": "d1", "text": "a lake"}\n{"id": "d2", "text": "a net"}\n'
    )
    joined = read_training_pairs(
        [], str(tmp_path / "queries.tsv"), str(tmp_path / "passages.jsonl")
    )
    assert joined == [("water", "a lake"), ("fish", "a net")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "", "no training pair in it"),
        ("a.tsv", "q\tp\nq p\n", r"a\.tsv:2: expected `query TAB passage"),
        ("a.tsv", "q\t\n", r"a\.tsv:1: expected `query TAB passage"),
        ("a.jsonl", '{"query": "q", "pos": ["p"]}\n{', r"a\.jsonl:2: not JSON \(Expecting"),
        ("a.jsonl", '{"query": "q"}', r"a\.jsonl:1: expected JSON with `query`, `pos`"),
        ("a.jsonl", '{"query": "q", "pos": "passage"}', r"a\.jsonl:1: expected JSON with"),
        ("a.jsonl", '{"query": "q", "pos": [1]}', r"a\.jsonl:1: expected JSON with"),
        ("a.jsonl", '{"query": "q", "pos": ["p"], "neg": "n"}', r"a\.jsonl:1: expected JSON with"),
        ("a.jsonl", '["q", "p"]', r"a\.jsonl:1: expected JSON with"),
    ],
)
def test_invalid_training_pairs_name_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_training_pairs([str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_unknown_passage_names_file_line_and_id(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "d1", "text": "a lake"}\n')
    queries = tmp_path / "q.tsv"
    queries.write_text("7\td1\twater\n8\td9\tfish\n")
    with pytest.raises(ValueError, match=r"q\.tsv:2: passage 'd9' is not in .*p\.jsonl"):
        read_training_pairs([], str(queries), str(tmp_path / "p.jsonl"))
    queries.write_text("7\td1\n")
    with pytest.raises(ValueError, match=r"q\.tsv:1: 2 columns, expected `query id TAB passage id"):
        read_training_pairs([], str(queries), str(tmp_path / "p.jsonl"))


def test_progress_is_logged_with_step_loss_and_time(distill, caplog):
    trainer, options = distill(max_steps=3)
    trainer.add_callback(runner.ProgressLines("ot sw seed 0", interval_seconds=0.0))
    with caplog.at_level(logging.INFO, "optical"):
        runner.run(trainer, options, resume=False)
    lines = [line for line in caplog.messages if "ot sw seed 0" in line]
    assert [line.split(",")[0].split(": ")[1] for line in lines] == [
        "step 1 of 3",
        "step 2 of 3",
    ]
    assert all(" loss 0." in line and " s left" in line for line in lines)


def test_every_line_of_progress_has_a_loss(distill, caplog):
    # The trainer itself would record the first loss after 50 steps.
    trainer, options = distill(max_steps=4, logging_steps=50, save_strategy="no")
    trainer.add_callback(runner.ProgressLines("sw", interval_seconds=0.0))
    with caplog.at_level(logging.INFO, "optical"):
        runner.run(trainer, options, resume=False)
    lines = [line for line in caplog.messages if line.startswith("    sw: step")]
    assert len(lines) == 3 and all(", loss 0." in line for line in lines)


@pytest.mark.parametrize("save", ["steps", "epoch", "no"])
def test_a_training_that_diverges_saves_nothing(distill, tmp_path, save):
    trainer, options = distill(learning_rate=1e30, max_steps=4, save_strategy=save, save_steps=4)
    with pytest.raises(ValueError, match=r"the training diverged: .* is NaN or infinite"):
        runner.run(trainer, options, resume=False)
    assert not list(tmp_path.glob("out/checkpoint-*")) and not (tmp_path / "out/final").exists()


# --- validation, early stopping, model card ------------------------------------------------------


def test_the_checkpoint_with_the_lowest_validation_loss_is_kept(distill, world, tmp_path, caplog):
    trainer, options = distill(
        options={"validation": [str(world / "bitext/en-sw.tsv")], "patience": 2},
        max_steps=40,
        save_steps=2,
    )
    trainer.add_callback(runner.ProgressLines("sw"))
    evaluate, pretended, true = trainer.evaluation_loop, iter([3.0, 1.0, 2.0, 2.0]), []

    def pretend(*arguments, **options):
        output = evaluate(*arguments, **options)
        true.append(output.metrics["eval_loss"])
        output.metrics["eval_loss"] = next(pretended)
        return output

    trainer.evaluation_loop = pretend
    with caplog.at_level(logging.INFO, "optical"):
        final = runner.run(trainer, options, resume=False)
    # It stops after two evaluations without a lower loss, and the best checkpoint alone remains.
    assert trainer.state.global_step == 8
    best = tmp_path / "out/checkpoint-4"
    assert [*tmp_path.glob("out/checkpoint-*")] == [best]
    assert_same(*({key.split("/")[1]: value for key, value in weights(folder).items()}
                  for folder in (final, best)))  # fmt: skip
    # The true loss of these sentences, which are those of the training, falls.
    assert len(true) == 4 and true[3] < true[0]
    assert "sw: step 2, validation loss 3.0000" in caplog.text
    assert "stopped at step 8; the best model is that of checkpoint-4" in caplog.text


def test_invalid_validation_is_refused(distill, world):
    bitext = {"validation": [str(world / "bitext/en-de.tsv")]}
    with pytest.raises(ValueError, match="validation: given, but save_strategy is no"):
        distill(options=bitext, save_strategy="no")
    with pytest.raises(ValueError, match="patience: given without validation"):
        distill(options={"patience": 2})
    with pytest.raises(ValueError, match="patience: -1, expected 0 or more"):
        distill(options=bitext | {"patience": -1})
    with pytest.raises(ValueError, match="1 folders for 2 files of bitext and validation"):
        distill(options=bitext | {"teacher_vectors": ["v"]})


def test_dropout_is_that_of_the_option(distill, tiny_models, pairs, tmp_path):
    def probabilities(model):
        return {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}

    assert probabilities(distill()[0].model) != {0.25}
    trainer, options = distill(options={"dropout": 0.25})
    assert probabilities(trainer.model) == {0.25}
    # The teacher reads without dropout, and the saved configuration is that of the student.
    saved = load_retriever(runner.run(trainer, options, resume=False))
    assert probabilities(saved) == probabilities(distill()[0].model)
    settings = recipes.TeacherOptions(model=tiny_models.teacher, pairs=pairs, dropout=0.0)
    trainer = recipes.teacher(settings, recipes.trainer_arguments(tmp_path / "teacher"))
    assert probabilities(trainer.model) == {0.0}
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout: .*, expected a number from 0 to below 1"):
            distill(options={"dropout": wrong})


def test_training_pairs_have_a_validation_loss_too(tiny_models, pairs, world, tmp_path):
    for name, more in (
        ("teacher", {}),
        ("codeswitch", {"lexicon": [f"sw={world / 'lexicon/en-sw.tsv'}"], "probability": 1.0}),
    ):
        settings = {"model": tiny_models.mixed, "pairs": pairs, "validation": pairs}
        trainer, options = recipe(name, tmp_path / name, **settings, **more)
        trainer.args.save_steps = trainer.args.eval_steps = 1
        runner.run(trainer, options, resume=False)
        assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
    # Validation texts are code-switched like those of the training.
    assert "mwalimu" in str(list(trainer.eval_dataset["positive"]))


@pytest.mark.parametrize("role", ["query", "document"])
def test_the_model_card_encodes_each_side_with_the_right_model(
    distill, world, tiny_models, tmp_path, role
):
    trainer, options = distill(options={"role": role}, max_steps=1)
    final = runner.run(trainer, options, resume=False)
    card = (final / "README.md").read_text()
    assert "distilled from a frozen teacher" in card and "widget" not in card
    assert '- "en"' in card and '- "sw"' in card and "`en-sw.tsv`" in card
    assert f"`{tiny_models.teacher}`" in card and f"`{tiny_models.wide}`" in card
    english, foreign = (world / "bitext/en-sw.tsv").read_text().split("\n")[0].split("\t")
    assert english not in card and foreign not in card
    other = "document" if role == "query" else "query"
    assert f"model.encode_{role}(" in card and f"teacher.encode_{other}(" in card
    # The example runs.
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(final))
    names = {}
    exec(code, names)
    assert names["scores"].shape == (1, 1)


# --- training texts of a student, objectives and masses ------------------------------------------


def columns(trainer):
    return {name: list(trainer.train_dataset[name]) for name in trainer.train_dataset.column_names}


def test_student_may_encode_plain_or_codeswitched_english(distill, world):
    lexicon = f"sw={world / 'lexicon/en-sw.tsv'}"
    other, _ = distill("other")
    english, _ = distill("english", options={"reads": "english"})
    both, _ = distill("both", options={"reads": "both", "lexicon": [lexicon], "probability": 1.0})
    assert list(columns(other)) == ["source", "target"]
    assert list(columns(english)) == ["source", "english"]
    assert columns(english)["english"] == columns(english)["source"] == columns(other)["source"]
    assert list(columns(both)) == ["source", "target", "english"]
    for source, target, switched in zip(*columns(both).values(), strict=True):
        # Every word but "the" has a translation.
        assert set(switched.split()) - {"the"} == set(target.split())
        assert switched.split()[0] == source.split()[0] == "the"
    batch = both.data_collator([both.train_dataset[0]])
    assert {"source_input_ids", "target_input_ids", "english_input_ids"} <= set(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": "mse"},
            "objective: 'mse', expected ot or divergence or position or pooled or greedy or",
        ),
        ({"mass": "tfidf"}, "mass: 'tfidf', expected uniform or idf"),
        ({"reads": "all"}, "reads: 'all', expected other or english or both"),
        ({"lexicon": ["sw=x"]}, "lexicon: given, but the student reads no English"),
        ({"reads": "both", "lexicon": ["x"]}, "lexicon: 'x', expected `language=file`"),
        ({"probability": 2.0}, "probability: 2.0, expected a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature: 0.0, expected a number > 0"),
        ({"skip_frequent": -1}, "skip_frequent: -1, expected 0 or more"),
        ({"rho": -1.0}, "rho is -1.0; expected numbers > 0"),
        (
            {"teacher_vectors": ["a", "b"]},
            "teacher_vectors: 2 folders for 1 files of bitext and validation",
        ),
    ],
)
def test_invalid_combinations_of_options(distill, changes, message):
    with pytest.raises(ValueError, match=message):
        distill(options=changes)


@pytest.mark.parametrize(
    "objective", ["ot", "divergence", "position", "pooled", "greedy", "contrastive"]
)
def test_every_objective_reduces_its_loss(distill, objective):
    options = {"objective": objective, "reads": "both"}
    trainer, chosen = distill(options=options, max_steps=12)
    runner.run(trainer, chosen, resume=False)
    history = losses(trainer)
    assert history[-1] < 0.9 * history[0]


def test_token_masses_of_the_bitext(distill, tiny_models):
    idf, _ = distill("idf", options={"mass": "idf"})
    for side, column in (("student", "target"), ("teacher", "source")):
        model = getattr(idf.loss, "model" if side == "student" else "teacher")
        mass = getattr(idf.loss, f"{side}_mass")
        texts = list(idf.train_dataset[column])
        tokens = [set(model.tokenizer(text)["input_ids"]) for text in texts]
        for token in set.union(*tokens):
            count = sum(token in each for each in tokens)
            expected = math.log((len(texts) + 1) / (count + 1))
            assert mass[token].item() == pytest.approx(expected, abs=1e-6)
        # Special tokens occur in every sentence and have no mass.
        assert mass[model.tokenizer.cls_token_id] == 0
    skipped, _ = distill("skipped", options={"skip_frequent": 4})
    mass = skipped.loss.teacher_mass
    tokenizer = skipped.loss.teacher.tokenizer
    assert (mass == 0).sum() == 4 and set(mass.tolist()) == {0.0, 1.0}
    assert mass[tokenizer.convert_tokens_to_ids("the")] == 0 == mass[tokenizer.sep_token_id]


def test_options_load_no_training_library():
    code = "import sys; from optical.training import DistillOptions, EncoderOptions"
    code += "; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"transformers", "sentence_transformers", "datasets", "tokenizers"}
    assert not heavy & set(done.stdout.split())
