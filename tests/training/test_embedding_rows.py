"""Training the input vectors of occurring subwords alone equals training the whole table."""

import logging

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from safetensors.torch import load_file
from transformers import TrainerCallback

from optical.models.retriever import load_retriever
from optical.training import recipes, runner
from optical.training.embedding_rows import PartialEmbedding, restrict_embeddings, trained_rows

TABLE = "embeddings.tok_embeddings.weight"


@pytest.fixture
def train(world, tiny_models, tmp_path):
    """Run a short training on few texts; returns the trainer and the folder of the model."""
    few = tmp_path / "few.tsv"
    lines = (world / "bitext/en-sw.tsv").read_text().splitlines()[:3]
    few.write_text("".join(f"{line}\n" for line in lines))

    def make(folder, recipe="distill", resume=False, callback=None, changes=(), **arguments):
        if recipe == "distill":
            settings = {"teacher": tiny_models.teacher, "bitext": [str(few)], "role": "document"}
            options = recipes.DistillOptions(**settings | dict(changes))
        else:
            settings = {"model": tiny_models.teacher, "pairs": [str(few)]}
            options = recipes.TeacherOptions(**settings | dict(changes))
        usual = {
            "max_steps": 3,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "disable_tqdm": True,
            "save_steps": 1,
            "use_cpu": True,
        }
        args = recipes.trainer_arguments(tmp_path / folder, **usual | arguments)
        trainer = getattr(recipes, recipe)(options, args)
        if callback:
            trainer.add_callback(callback)
        return trainer, runner.run(trainer, options, resume=resume)

    return make


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)


def table_of(model):
    return model[0].auto_model.get_input_embeddings()


def test_a_partial_embedding_computes_and_learns_as_the_whole_one():
    full = torch.nn.Embedding(9, 4, padding_idx=1)
    whole = torch.nn.Embedding(9, 4, padding_idx=1)
    whole.load_state_dict(full.state_dict())
    part = PartialEmbedding(full, torch.tensor([0, 1, 4, 7]))
    assert part.ids.tolist() == [0, 4, 7]
    ids = torch.tensor([[0, 7, 7, 1], [4, 3, 8, 1]])
    assert torch.equal(part(ids), whole(ids))

    weight = torch.randn(2, 4, 4)
    occurring = torch.tensor([[0, 7, 7, 1], [4, 0, 7, 1]])
    for module in (part, whole):
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0
        )
        for _ in range(3):
            optimizer.zero_grad()
            (module(occurring) * weight).sum().backward()
            optimizer.step()
    assert not torch.equal(whole.weight[4], full.weight[4])
    assert_same(dict(part.state_dict()), dict(whole.state_dict()))
    assert torch.equal(part(ids), whole(ids))


def test_the_state_of_a_partial_embedding_is_that_of_the_whole_table():
    full, other = torch.nn.Embedding(9, 4), torch.nn.Embedding(9, 4)
    part = PartialEmbedding(full, torch.tensor([2, 5]))
    assert list(part.state_dict()) == ["weight"]
    part.load_state_dict(other.state_dict())
    assert torch.equal(part.state_dict()["weight"], other.weight)
    assert torch.equal(part(torch.arange(9)), other(torch.arange(9)))
    for state, message in (({}, "Missing"), ({"weight": torch.zeros(8, 4)}, r"shape \(8, 4\)")):
        with pytest.raises(RuntimeError, match=message):
            part.load_state_dict(state)


@pytest.mark.parametrize("recipe", ["distill", "teacher"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_training_occurring_rows_equals_training_all(train, tiny_models, recipe, optim, caplog):
    whole, expected = train("all", recipe, changes={"embeddings": "all"}, optim=optim)
    with caplog.at_level(logging.INFO, "optical"):
        part, found = train("auto", recipe, optim=optim)
    rows, size = trained_rows(part.model), len(table_of(whole.model).weight)
    assert 5 < rows < size / 2
    assert f"{rows} of {size} input vectors occur in the texts" in caplog.text
    assert_same(weights(found), weights(expected))
    start = table_of(load_retriever(tiny_models.teacher)).weight
    moved = (weights(found)[TABLE] - start).abs().amax(1) > 0
    assert 5 < moved.sum() <= rows
    optimized = [p for group in part.optimizer.param_groups for p in group["params"]]
    assert max(len(parameter) for parameter in optimized if parameter.dim() == 2) < size
    # The saved model is an ordinary one, with the tokenizer as it was.
    assert type(table_of(load_retriever(found))) is torch.nn.Embedding
    assert (found / "tokenizer.json").read_text() == (expected / "tokenizer.json").read_text()
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_resumed_training_equals_an_uninterrupted_one(train):
    _, expected = train("whole", max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        train("parts", max_steps=4, callback=Stop())
    trainer, found = train("parts", max_steps=4, resume=True)
    assert trained_rows(trainer.model)
    assert_same(weights(found), weights(expected))


def test_checkpoints_of_other_trained_rows_are_refused(train):
    with pytest.raises(KeyboardInterrupt):
        train("out", max_steps=4, callback=Stop())
    with pytest.raises(ValueError, match=r"trained_input_vectors was [0-9]+, now the default"):
        train("out", max_steps=4, resume=True, changes={"embeddings": "all"})


@pytest.mark.parametrize("change", [{"weight_decay": 0.1}, {"optim": "adafactor"}])
def test_auto_trains_all_where_the_result_would_differ(train, change):
    trainer, _ = train("out", max_steps=1, **change)
    assert trained_rows(trainer.model) is None
    trainer, _ = train("forced", max_steps=1, changes={"embeddings": "occurring"}, **change)
    assert trained_rows(trainer.model)


def test_auto_trains_all_if_most_rows_occur(train, world, tiny_models):
    data = {"student": tiny_models.wide, "bitext": [str(world / "bitext/en-sw.tsv")]}
    trainer, _ = train("out", max_steps=1, changes={**data, "reads": "both"})
    assert trained_rows(trainer.model) is None


def test_streams_train_all(train):
    trainer, _ = train("out", max_steps=1, changes={"stream": True})
    assert trained_rows(trainer.model) is None
    with pytest.raises(ValueError, match="'occurring', but the texts of a stream are not known"):
        train("refused", max_steps=1, changes={"stream": True, "embeddings": "occurring"})


def test_input_vectors_may_be_frozen(train, tiny_models):
    _, final = train("out", changes={"embeddings": "none"})
    start = load_retriever(tiny_models.teacher)[0].auto_model.state_dict()
    found = weights(final)
    assert torch.equal(found[TABLE], start[TABLE])
    assert any(not torch.equal(found[key], value) for key, value in start.items())


@pytest.mark.parametrize("recipe", ["distill", "teacher"])
def test_other_choices_are_refused(train, recipe):
    with pytest.raises(ValueError, match="embeddings: 'some', expected auto or all or occ"):
        train("out", recipe, changes={"embeddings": "some"})


def test_encoders_that_share_their_table_train_all(tiny_models):
    model = load_retriever(tiny_models.teacher)
    encoder = model[0].auto_model
    encoder.shared = table_of(model)
    arguments = recipes.trainer_arguments("unused")
    restrict_embeddings(model, "auto", arguments, [], "document")
    assert type(table_of(model)) is torch.nn.Embedding
    with pytest.raises(ValueError, match="the encoder uses its input vectors in 2 places"):
        restrict_embeddings(model, "occurring", arguments, [], "document")
