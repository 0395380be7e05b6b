"""OTDistillationLoss in the contract of Sentence Transformers, with stand-ins for the models."""

import pytest
import torch
from torch import nn

from optical import ot_alignment
from optical.losses.distillation import OTDistillationLoss


class Model(nn.Module):
    """Looks up token vectors; the scoring mask leaves token 1 out, as a skip-list would."""

    def __init__(self, size=8, words=20, dropout=0.0, tells_size=True):
        super().__init__()
        self.vectors = nn.Embedding(words, size)
        self.dropout = nn.Dropout(dropout)
        self.size, self.tasks = size, []
        if tells_size:
            self.get_embedding_dimension = lambda: size

    def forward(self, features, task=None):
        self.tasks.append(task)
        vectors = nn.functional.normalize(self.dropout(self.vectors(features["input_ids"])), dim=-1)
        mask = features["attention_mask"] * (features["input_ids"] != 1)
        return {**features, "token_embeddings": vectors, "attention_mask": mask}


def batch(pairs=4, tokens=5, words=20, **more):
    ids = torch.randint(2, words, (pairs, tokens))
    ids[:, 1] = 1
    mask = (torch.arange(tokens) < torch.randint(3, tokens + 1, (pairs, 1))).long()
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.fixture
def models():
    return Model(), Model(words=30)


def test_is_the_mean_distance_of_the_scored_tokens(models):
    student, teacher = models
    options = {"epsilon": 0.1, "max_iter": 20, "tol": 1e-6, "backend": "reference"}
    source, target = batch(tokens=7, words=30), batch()
    found = OTDistillationLoss(student, teacher, **options)([source, target])
    assert list(found) == ["ot_cost"] and found["ot_cost"].shape == ()
    taught, learnt = teacher(source), student(target)
    expected = ot_alignment(
        learnt["token_embeddings"],
        taught["token_embeddings"],
        learnt["attention_mask"],
        taught["attention_mask"],
        **options,
    )
    torch.testing.assert_close(found["ot_cost"], expected.mean())
    found["ot_cost"].backward()
    gradient = student.vectors.weight.grad
    assert gradient.abs().sum() > 0
    assert not gradient[1].any()  # left out by the scoring mask
    assert teacher.vectors.weight.grad is None


def test_every_further_column_counts_alike(models):
    loss = OTDistillationLoss(*models)
    source, first, second = batch(), batch(), batch(tokens=9)
    single = [loss([source, one])["ot_cost"] for one in (first, second)]
    torch.testing.assert_close(loss([source, first, second])["ot_cost"], sum(single) / 2)


def test_the_teacher_is_frozen_and_never_wakes():
    teacher = Model(dropout=0.5).train()
    loss = OTDistillationLoss(Model(), teacher)
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    assert [id(p) for p in trained] == [id(loss.model.vectors.weight)]
    assert loss.train() is loss and loss.model.training and not teacher.training
    features = [batch(), batch()]
    assert loss(features)["ot_cost"] == loss(features)["ot_cost"]
    loss.eval()
    assert not loss.model.training and not teacher.training


def test_the_task_of_the_batch_reaches_both_models(models):
    loss = OTDistillationLoss(*models)
    loss([batch(task="query"), batch(task="query")])
    loss([batch(), batch()])
    assert [model.tasks for model in models] == [["query", "document"]] * 2


def test_does_not_change_the_batch_it_is_given(models):
    features = [batch(), batch()]
    keys = [set(one) for one in features]
    OTDistillationLoss(*models)(features)
    assert [set(one) for one in features] == keys


def test_two_half_batches_give_the_gradient_of_the_whole(models):
    student, _ = models
    loss = OTDistillationLoss(*models)
    whole = [batch(pairs=8, tokens=7), batch(pairs=8)]
    loss(whole)["ot_cost"].backward()
    expected = student.vectors.weight.grad.clone()
    student.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        part = [{name: value[half] for name, value in one.items()} for one in whole]
        (loss(part)["ot_cost"] / 2).backward()
    torch.testing.assert_close(student.vectors.weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_different_sizes_are_refused_with_both_and_the_remedy():
    with pytest.raises(ValueError, match=r"teacher .* size 16, the student of size 8.*Dense.*`dim"):
        OTDistillationLoss(Model(8), Model(16))


def test_models_that_do_not_tell_their_size_fail_at_the_first_batch():
    loss = OTDistillationLoss(Model(8, tells_size=False), Model(16, tells_size=False))
    with pytest.raises(ValueError, match=r"teacher has shape .*16.*; expected .*8"):
        loss([batch(), batch()])


def test_a_dense_model_is_taken_by_its_tokens_not_by_its_sentence_vector():
    """Whatever a module behind the pooling makes of the sentence vector, tokens keep their size."""

    class Pooling(nn.Module):
        pass

    dense = Model(8)
    dense.pooling = Pooling()
    dense.get_embedding_dimension = lambda: 4
    assert OTDistillationLoss(dense, Model(8))([batch(), batch()])["ot_cost"].isfinite()


def test_models_on_different_devices_are_named(models):
    student, teacher = models
    loss = OTDistillationLoss(student.to("meta"), teacher)
    away = {name: value.to("meta") for name, value in batch().items()}
    with pytest.raises(ValueError, match="teacher is on cpu; expected meta, where student is"):
        loss([batch(), away])


def test_a_batch_without_translations_is_refused(models):
    with pytest.raises(ValueError, match="one column; expected a source and at least one target"):
        OTDistillationLoss(*models)([batch()])


@pytest.mark.parametrize("option", [{"epsilon": 0.0}, {"gradient": "x"}, {"backend": "gpu"}])
def test_bad_options_fail_when_the_loss_is_made(models, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is "):
        OTDistillationLoss(*models, **option)


def test_tells_the_model_card_its_options_and_its_source(models):
    loss = OTDistillationLoss(*models, epsilon=0.2)
    assert loss.get_config_dict() == {
        "cost": "cosine",
        "epsilon": 0.2,
        "max_iter": 50,
        "tol": 0.0,
        "gradient": "envelope",
        "backend": "auto",
    }
    assert loss.citation.strip().startswith("@inproceedings{huang2023optical,")
    assert loss.citation.count("{") == loss.citation.count("}")
