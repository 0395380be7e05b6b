"""Centred retrievers subtract the mean token vector before they normalise."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from sentence_transformers import MultiVectorEncoder

from optical.data.pairs import read_training_pairs
from optical.models.centering import center_vectors
from optical.models.encoding import encode
from optical.models.retriever import load_retriever
from optical.training import recipes, runner

TEXTS = ["the teacher buys the bread", "water", "the big house is far"]


def cosines(vectors):
    return (vectors @ vectors.T).mean()


@pytest.mark.parametrize("dimension", [None, 8])
def test_the_mean_vector_is_subtracted(tiny_models, tmp_path, dimension):
    model = load_retriever(tiny_models.mixed, dimension=dimension)
    raw = encode(MultiVectorEncoder(modules=list(model)[:-1]), TEXTS, "document").vectors
    centred = center_vectors(model, TEXTS)
    expected = torch.nn.functional.normalize(raw - raw.mean(0))
    found = encode(centred, TEXTS, "document").vectors
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert cosines(found) < cosines(encode(model, TEXTS, "document").vectors)
    # Queries are shifted by the same vector, and the saved model is the same.
    centred.save_pretrained(str(tmp_path))
    loaded = load_retriever(tmp_path)
    for role in ("document", "query"):
        torch.testing.assert_close(*(encode(x, TEXTS, role).vectors for x in (loaded, centred)))


def test_a_model_without_vectors_to_center_is_refused(tiny_models):
    model = load_retriever(tiny_models.mixed)
    with pytest.raises(ValueError, match="center: no text given"):
        center_vectors(model, [])
    with pytest.raises(ValueError, match="center: the model does not normalise"):
        center_vectors(MultiVectorEncoder(modules=list(model)[:-1]), TEXTS)


def test_a_centred_teacher_and_its_student(tiny_models, world, tmp_path):
    pairs = [str(world / "teacher.tsv")]
    options = recipes.TeacherOptions(model=tiny_models.mixed, pairs=pairs, center=True)
    args = {"max_steps": 1, "learning_rate": 0.0, "disable_tqdm": True}
    trainer = recipes.teacher(options, recipes.trainer_arguments(tmp_path / "teacher", **args))
    folder = runner.run(trainer, options, resume=False)
    teacher = load_retriever(folder)
    kinds = [type(module).__name__ for module in teacher]
    assert kinds == ["Transformer", "Dense", "MultiVectorMask", "Normalize"]
    passages = list(dict.fromkeys(passage for _, passage in read_training_pairs(pairs)))
    expected = center_vectors(load_retriever(tiny_models.mixed), passages)
    torch.testing.assert_close(
        *(encode(x, TEXTS, "document").vectors for x in (teacher, expected)), rtol=0, atol=1e-4
    )
    bitext = [str(world / "bitext/en-sw.tsv")]
    distil = recipes.DistillOptions(teacher=str(folder), bitext=bitext, role="document")
    trainer = recipes.distill(distil, recipes.trainer_arguments(tmp_path / "student", **args))
    assert [type(module).__name__ for module in trainer.model] == kinds
