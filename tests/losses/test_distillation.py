"""OTDistillationLoss in the contract of Sentence Transformers, with stub models."""

import pytest
import torch
from torch import nn

from optical import ot_alignment
from optical.losses.distillation import DivergenceDistillationLoss, OTDistillationLoss


class Model(nn.Module):
    """Looks up token vectors; the scoring mask leaves out token 1, as a skip list does."""

    def __init__(self, size=8, words=20, dropout=0.0, reports_size=True):
        super().__init__()
        self.vectors = nn.Embedding(words, size)
        self.dropout = nn.Dropout(dropout)
        self.size, self.tasks = size, []
        if reports_size:
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


def test_is_the_mean_cost_of_the_scored_tokens(models):
    student, teacher = models
    options = {"epsilon": 0.1, "max_iter": 20, "tol": 1e-6, "backend": "reference"}
    source, target = batch(tokens=7, words=30), batch()
    actual = OTDistillationLoss(student, teacher, **options)([source, target])
    assert list(actual) == ["ot_cost"] and actual["ot_cost"].shape == ()
    teacher_output, student_output = teacher(source), student(target)
    expected = ot_alignment(
        student_output["token_embeddings"],
        teacher_output["token_embeddings"],
        student_output["attention_mask"],
        teacher_output["attention_mask"],
        **options,
    )
    torch.testing.assert_close(actual["ot_cost"], expected.mean())
    actual["ot_cost"].backward()
    gradient = student.vectors.weight.grad
    assert gradient.abs().sum() > 0
    assert not gradient[1].any()  # left out by the scoring mask
    assert teacher.vectors.weight.grad is None


def test_target_columns_are_averaged(models):
    loss = OTDistillationLoss(*models)
    source, first, second = batch(), batch(), batch(tokens=9)
    single = [loss([source, column])["ot_cost"] for column in (first, second)]
    torch.testing.assert_close(loss([source, first, second])["ot_cost"], sum(single) / 2)


def test_the_teacher_is_frozen_and_stays_in_evaluation_mode():
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


def test_does_not_modify_the_batch(models):
    features = [batch(), batch()]
    keys = [set(column) for column in features]
    OTDistillationLoss(*models)(features)
    assert [set(column) for column in features] == keys


def test_accumulated_half_batches_give_the_gradient_of_the_batch(models):
    student, _ = models
    loss = OTDistillationLoss(*models)
    whole = [batch(pairs=8, tokens=7), batch(pairs=8)]
    loss(whole)["ot_cost"].backward()
    expected = student.vectors.weight.grad.clone()
    student.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        part = [{name: value[half] for name, value in column.items()} for column in whole]
        (loss(part)["ot_cost"] / 2).backward()
    torch.testing.assert_close(student.vectors.weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_different_vector_sizes_raise():
    with pytest.raises(ValueError, match=r"teacher .* size 16, the student of size 8.*Dense.*`dim"):
        OTDistillationLoss(Model(8), Model(16))


def test_models_of_unknown_vector_size_raise_at_the_first_batch():
    loss = OTDistillationLoss(Model(8, reports_size=False), Model(16, reports_size=False))
    with pytest.raises(ValueError, match=r"teacher has shape .*16.*; expected .*8"):
        loss([batch(), batch()])


def test_the_sentence_vector_size_of_a_dense_model_is_ignored():
    """Modules after the pooling change the size of the sentence vector, not of the tokens."""

    class Pooling(nn.Module):
        pass

    dense = Model(8)
    dense.pooling = Pooling()
    dense.get_embedding_dimension = lambda: 4
    assert OTDistillationLoss(dense, Model(8))([batch(), batch()])["ot_cost"].isfinite()


def test_models_on_different_devices_raise(models):
    student, teacher = models
    loss = OTDistillationLoss(student.to("meta"), teacher)
    away = {name: value.to("meta") for name, value in batch().items()}
    with pytest.raises(ValueError, match="teacher is on cpu; expected meta, where student is"):
        loss([batch(), away])


def test_a_batch_without_translations_raises(models):
    with pytest.raises(ValueError, match="one column; expected a source and at least one target"):
        OTDistillationLoss(*models)([batch()])


@pytest.mark.parametrize("loss", [OTDistillationLoss, DivergenceDistillationLoss])
@pytest.mark.parametrize("option", [{"epsilon": 0.0}, {"gradient": "x"}, {"backend": "gpu"}])
def test_invalid_options_raise_in_the_constructor(models, loss, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is "):
        loss(*models, **option)


def test_a_divergence_has_one_penalty_for_both_sides(models):
    with pytest.raises(ValueError, match=r"rho is .*; expected one strength for both sides"):
        DivergenceDistillationLoss(*models, rho=(0.1, 0.2))
    with pytest.raises(TypeError, match=r"DivergenceDistillationLoss.*reach"):
        DivergenceDistillationLoss(*models, reach=1.0)


def test_provides_options_and_citation_for_the_model_card(models):
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
    debiased = DivergenceDistillationLoss(*models, epsilon=0.2, rho=0.5)
    expected = {"epsilon": 0.2, "max_iter": 50, "tol": 0.0, "rho": 0.5}
    assert debiased.get_config_dict() == expected
    assert "S{\\'e}journ{\\'e}" in debiased.citation
    assert debiased.citation.count("{") == debiased.citation.count("}")
