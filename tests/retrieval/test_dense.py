"""Search with models as they are, one vector or token vectors for each text, and their prompts."""

import json

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from optical.data.collection import Collection
from optical.models.encoding import cut_passages, encode
from optical.models.retriever import load_multi_vector, load_retriever
from optical.retrieval.dense import load_dense, search_dense

QUERIES = {"q0": "the teacher buys bread", "q1": "mkulima anaona maji"}
DOCUMENTS = {
    "d0": "the teacher buys the bread",
    "d1": "mwalimu ananunua mkate",
    "d2": "the farmer sees the water",
    "d3": "the farmer sees the water",
    "d4": "",
}


def collection(documents=None):
    return Collection("tiny", QUERIES, documents or DOCUMENTS, {"q0": {"d0": 1}, "q1": {"d2": 1}})


@pytest.fixture(scope="module")
def saved(tiny_models, tmp_path_factory):
    """Dense models of one encoder: without prompts, and with those of multilingual E5."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("dense")
    encoder = Transformer(tiny_models.mixed)
    pooling = Pooling(encoder.get_embedding_dimension(), "mean")
    for name, more in (
        ("plain", {}),
        ("e5", {"prompts": {"query": "the book ", "passage": "lamp fish "}}),
        ("dot", {"similarity_fn_name": "dot"}),
        ("far", {"similarity_fn_name": "euclidean"}),
    ):
        SentenceTransformer(modules=[encoder, pooling], **more).save_pretrained(folder / name)
    return folder


def by_hand(folder, query_prompt="", document_prompt="", unit=True):
    """Return the scores of all pairs by matrix product, with the prompts written into the texts."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder))
    model.prompts = {}
    sides = [
        model.encode([prompt + text for text in texts.values()], normalize_embeddings=unit)
        for prompt, texts in ((query_prompt, QUERIES), (document_prompt, DOCUMENTS))
    ]
    return sides[0] @ sides[1].T


def scores(run):
    return np.array([[run[query][document] for document in DOCUMENTS] for query in QUERIES])


@pytest.mark.parametrize(
    ("name", "given", "prompts", "unit"),
    [
        ("plain", {}, ("", ""), True),
        ("e5", {}, ("the book ", "lamp fish "), True),
        ("e5", {"document_prompt": ""}, ("the book ", ""), True),
        ("plain", {"query_prompt": "maji ", "document_prompt": "a "}, ("maji ", "a "), True),
        ("dot", {}, ("", ""), False),
    ],
)
def test_scores_are_the_models_similarity_with_its_prompts(saved, name, given, prompts, unit):
    model = load_dense(str(saved / name), **given)
    run = search_dense(model, collection(), batch_size=2)
    expected = by_hand(saved / name, *prompts, unit=unit)
    np.testing.assert_allclose(scores(run), expected, atol=1e-5)
    # Equal texts have equal scores; the higher id is first.
    for found in run.values():
        assert found["d2"] == found["d3"]
        assert list(found).index("d3") + 1 == list(found).index("d2")


def test_passages_are_scored_by_the_best_one(saved):
    model = load_dense(str(saved / "plain"))
    long = {"d0": " ".join(["the farmer sees the water"] * 3 + ["the teacher buys the bread"] * 2)}
    whole = search_dense(model, collection(long))["q0"]["d0"]
    best = search_dense(model, collection(long), passage_length=8, passage_stride=3)["q0"]["d0"]
    passages = cut_passages(long["d0"], model.tokenizer, 8, 3)
    each = search_dense(model, collection({f"p{i}": text for i, text in enumerate(passages)}))["q0"]
    assert best == pytest.approx(max(each.values()), abs=1e-5) and best > whole


def test_prompts_count_towards_the_length_of_passages(saved):
    tokenizer = load_dense(str(saved / "e5")).tokenizer
    text = " ".join(["the farmer sees the water"] * 4)
    prompt = "lamp fish "
    before = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    passages = cut_passages(text, tokenizer, 12, 4, prompt)
    assert passages == cut_passages(text, tokenizer, 12 - before, 4)
    assert all(len(tokenizer(prompt + passage)["input_ids"]) <= 12 for passage in passages)
    with pytest.raises(ValueError, match="tokens of the prompt"):
        cut_passages(text, tokenizer, before + 2, 1, prompt)


def test_late_interaction_models_keep_their_prompts(tiny_models, tmp_path):
    """A prompt that is saved as "passage" is used for documents."""
    model = load_retriever(tiny_models.teacher)
    model.prompts = {"query": "the book ", "passage": "lamp fish "}
    model.save_pretrained(str(tmp_path / "prompted"))
    plain = load_retriever(tiny_models.teacher)
    for load in (load_retriever, load_multi_vector):
        prompted = load(str(tmp_path / "prompted"))
        for role, prompt in (("query", "the book "), ("document", "lamp fish ")):
            expected = encode(plain, [f"{prompt}water"], role).vectors
            np.testing.assert_allclose(encode(prompted, ["water"], role).vectors, expected)
    changed = load_multi_vector(str(tmp_path / "prompted"), document_prompt="a ", query_prompt="")
    assert (changed.prompts["document"], changed.prompts["query"]) == ("a ", "")


def test_models_of_the_wrong_kind_are_refused(saved, tiny_models, tmp_path):
    with pytest.raises(ValueError, match="returns token vectors; use the recipe `multivector`"):
        load_dense(tiny_models.teacher)
    for name in (saved / "plain", tiny_models.mixed):
        with pytest.raises(ValueError, match="no token vectors for retrieval; use the recipe `de"):
            load_multi_vector(str(name))
    with pytest.raises(ValueError, match="similarity is 'euclidean'; expected one of cosine, dot"):
        load_dense(str(saved / "far"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_dense(str(tmp_path))
