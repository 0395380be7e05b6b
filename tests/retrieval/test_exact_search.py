"""Exact search equals the MaxSim of Sentence Transformers, for any tile and batch size."""

import logging
import os
import sys

import pytest
import torch

from optical.data.collection import Collection
from optical.data.trec import ranked
from optical.models.encoding import TokenVectors, cut_passages, encode, use_bfloat16
from optical.retrieval.exact_search import search, search_vectors
from optical.retrieval.maxsim import EMPTY_DOCUMENT_SCORE

# Models are built here without network access; huggingface_hub reads this variable on import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["maji", "ni", "uhai", "bahari", "mto", "mlima", "anga", "nyota", "jua", "moto", "water"]


def random_vectors(count, dim=16, longest=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    pieces = [torch.randn(length, dim, generator=generator) for length in lengths]
    return [torch.nn.functional.normalize(piece, dim=-1) for piece in pieces]


def named(prefix, pieces):
    return {f"{prefix}{index}": piece for index, piece in enumerate(pieces)}


def reference_maxsim(query, document):
    return sum(max(float(q @ d) for d in document) for q in query)


# --- vectors -------------------------------------------------------------------------------------


def test_scores_match_the_formula():
    queries, documents = random_vectors(3, seed=1), random_vectors(5, seed=2)
    run = search_vectors(named("q", queries), named("d", documents))
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            assert run[f"q{i}"][f"d{j}"] == pytest.approx(
                reference_maxsim(query, document), abs=1e-5
            )


def test_scores_match_sentence_transformers():
    util = pytest.importorskip("sentence_transformers.util")
    queries = random_vectors(40, longest=20, seed=3)
    documents = [3.0 * piece for piece in random_vectors(300, longest=70, seed=4)]
    run = search_vectors(named("q", queries), named("d", documents))
    expected = util.maxsim(queries, documents)
    for i in range(len(queries)):
        found = torch.tensor([run[f"q{i}"][f"d{j}"] for j in range(len(documents))])
        torch.testing.assert_close(found, expected[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_elements", [1, 50, 3000, 10**6])
def test_the_run_does_not_depend_on_the_tile_size(chunk_elements):
    queries, documents = random_vectors(9, seed=5), random_vectors(700, seed=6)
    usual = search_vectors(named("q", queries), named("d", documents), depth=100)
    run = search_vectors(
        named("q", queries), named("d", documents), depth=100, chunk_elements=chunk_elements
    )
    for qid in usual:
        assert list(run[qid]) == list(usual[qid])
        assert list(run[qid].values()) == pytest.approx(list(usual[qid].values()), abs=1e-5)


def test_depth_limits_the_run_to_the_best_documents():
    queries, documents = random_vectors(4, seed=7), random_vectors(3000, seed=8)
    everything = search_vectors(named("q", queries), named("d", documents), depth=3000)
    best = search_vectors(named("q", queries), named("d", documents), depth=10)
    for qid, scores in everything.items():
        assert len(scores) == 3000
        assert list(scores.items()) == ranked(scores)
        assert list(best[qid].items()) == ranked(scores)[:10]


def test_ties_are_broken_by_id_for_any_order_of_documents():
    document = torch.eye(3)[:1]
    ids = [f"d{index}" for index in (5, 30, 2, 11, 4)]
    for order in (ids, ids[::-1]):
        run = search_vectors(
            {"q": torch.eye(3)}, dict.fromkeys(order, document), depth=3, chunk_elements=3
        )
        assert run == {"q": {"d5": 1.0, "d4": 1.0, "d30": 1.0}}
        assert list(run["q"]) == ["d5", "d4", "d30"]


def test_negative_and_zero_scores_are_ordered():
    """Scores are compared by their bits, in which the sign and -0.0 are special cases."""
    query = torch.tensor([[1.0]])
    values = [-2.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, -1e30, 1e30]
    documents = {f"d{index}": torch.tensor([[value]]) for index, value in enumerate(values)}
    run = search_vectors({"q": query}, documents)["q"]
    assert list(run.items()) == ranked(run)
    assert list(run) == ["d7", "d5", "d4", "d3", "d2", "d1", "d0", "d6"]


def test_a_document_without_tokens_ranks_last():
    documents = {"z": torch.zeros(0, 2), "a": -torch.eye(2), "y": torch.zeros(0, 2)}
    run = search_vectors({"q": torch.eye(2)}, documents)
    assert list(run["q"].items()) == [
        ("a", 0.0),
        ("z", EMPTY_DOCUMENT_SCORE),
        ("y", EMPTY_DOCUMENT_SCORE),
    ]


def test_a_query_without_tokens_retrieves_nothing(caplog):
    with caplog.at_level(logging.WARNING, "optical"):
        run = search_vectors({"p": torch.zeros(0, 2), "q": torch.eye(2)}, {"d": torch.eye(2)})
    assert run == {"p": {}, "q": {"d": 2.0}}
    assert "1 of 2 queries have no tokens" in caplog.text
    assert search_vectors({"p": torch.zeros(0, 2)}, {"d": torch.eye(2)}) == {"p": {}}
    assert search_vectors({"q": torch.eye(2)}, {}) == {"q": {}}


def test_half_precision_vectors_are_scored_in_float32():
    pieces = random_vectors(30, seed=9)
    half = search_vectors(
        {"q": pieces[0].bfloat16()}, named("d", [piece.bfloat16() for piece in pieces])
    )
    full = search_vectors(
        {"q": pieces[0].bfloat16().float()},
        named("d", [piece.bfloat16().float() for piece in pieces]),
    )
    assert half == full


def test_vectors_that_require_gradients_are_accepted():
    vectors = torch.eye(2, requires_grad=True)
    assert search_vectors({"q": vectors}, {"d": vectors}) == {"q": {"d": 2.0}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"q": torch.eye(2)}, {"d": torch.eye(3)}),
         "query vectors have 2 dimensions and document vectors 3; both models must end in"),
        (({"q": torch.eye(2)}, {"d": torch.full((1, 2), float("nan"))}), "scores are not finite"),
        (({"q": torch.eye(2)}, (["a", "b"], TokenVectors(torch.eye(2), torch.tensor([2])))),
         "documents: 2 ids but vectors of 1 texts"),
        ((({"q": torch.eye(2)}), (["a", "a"], TokenVectors(torch.eye(2), torch.tensor([1, 1])))),
         "documents: an id appears a second time"),
    ],
)  # fmt: skip
def test_invalid_vectors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        search_vectors(*arguments)


@pytest.mark.parametrize("name", ["depth", "chunk_elements"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        search_vectors({"q": torch.eye(2)}, {"d": torch.eye(2)}, **{name: 0})


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """Build tiny random encoders that expand queries with [MASK] and skip "ni" in documents."""
    pytest.importorskip("sentence_transformers", reason="needs the extra `train`")
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Normalize
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("backbone")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
        )
    ).save_pretrained(folder)  # fmt: skip

    def make(dim=16, seed=0, skip=("ni",), expand=True):
        torch.manual_seed(seed)
        expansion = {"strategy": "fixed", "length": 8, "attend": False} if expand else None
        return MultiVectorEncoder(
            modules=[
                Transformer(str(folder), query_expansion=expansion),
                Dense(32, dim, bias=False, activation_function=torch.nn.Identity(),
                      module_input_name="token_embeddings"),
                MultiVectorMask(skiplist_words=list(skip), skiplist_tasks=["document"]),
                Normalize(module_input_name="token_embeddings"),
            ],
            device="cpu",
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def collection():
    generator = torch.Generator().manual_seed(3)

    def text(longest):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[index] for index in picked)

    documents = {f"d{index}": text(30) for index in range(60)}
    documents |= {"copy": documents["d7"], "empty": ""}
    queries = {f"q{index}": text(6) for index in range(5)}
    return Collection("tiny", queries, documents, {qid: {"d0": 1} for qid in queries})


def test_encode_concatenates_the_models_vectors(model):
    texts = ["maji ni uhai", "", "bahari"]
    documents = encode(model, texts, "document")
    # [CLS] and [SEP] are scored, "ni" is not.
    assert documents.lengths.tolist() == [4, 2, 3]
    assert (len(documents), documents.dim) == (3, 16)
    assert (documents.vectors.shape, documents.vectors.dtype) == ((9, 16), torch.float32)
    for ours, theirs in zip(documents.split(), model.encode_document(texts), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert encode(model, texts, "query", batch_size=1).lengths.tolist() == [8, 8, 8]
    assert not documents.vectors.requires_grad
    assert not documents.vectors.is_inference()
    assert len(encode(model, [], "query")) == 0


def test_encode_records_token_ids_on_request(model):
    texts = ["maji ni uhai", "", "bahari"]
    plain, recorded = (encode(model, texts, "document", token_ids=x) for x in (False, True))
    assert torch.equal(plain.vectors, recorded.vectors)
    assert recorded.lengths.tolist() == plain.lengths.tolist()
    words = [model.tokenizer.convert_ids_to_tokens(ids) for ids in recorded.split_token_ids()]
    assert words == [
        ["[CLS]", "maji", "uhai", "[SEP]"],
        ["[CLS]", "[SEP]"],
        ["[CLS]", "bahari", "[SEP]"],
    ]
    with pytest.raises(ValueError, match="token_ids were not recorded"):
        plain.split_token_ids()


def test_an_encoder_may_compute_in_bfloat16(make_model):
    model = make_model()
    texts = ["the teacher buys the bread", "maji"]
    expected = encode(model, texts, "document").vectors
    use_bfloat16(model)
    found = encode(model, texts, "document").vectors
    assert found.dtype == torch.float32 and found.shape == expected.shape
    error = (found - expected).abs().max()
    assert 1e-5 < error < 0.05
    # Weights stay in float32.
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_queries_may_be_encoded_in_advance(model, collection):
    vectors = encode(model, list(collection.queries.values()), "query")
    # The query model is not needed.
    run = search(None, collection, document_model=model, query_vectors=vectors)
    assert run == search(model, collection)
    wrong = encode(model, ["maji"], "query")
    with pytest.raises(ValueError, match="query_vectors: of 1 texts, but the collection has 5 que"):
        search(model, collection, query_vectors=wrong)


def test_search_matches_the_models_own_similarity(model, collection):
    run = search(model, collection)
    similarity = model.similarity(
        model.encode_query(list(collection.queries.values())),
        model.encode_document(list(collection.documents.values())),
    )
    for row, qid in enumerate(collection.queries):
        expected = dict(zip(collection.documents, similarity[row].tolist(), strict=True))
        assert run[qid] == pytest.approx(expected, abs=1e-5)
        assert list(run[qid].items()) == ranked(run[qid])
        # Equal texts have identical scores, so they are in the order of their ids.
        assert run[qid]["copy"] == run[qid]["d7"]
        order = list(run[qid])
        assert order.index("d7") + 1 == order.index("copy")


@pytest.mark.parametrize(("batch_size", "chunk_elements"), [(1, 1), (7, 500), (64, 10**6)])
def test_search_does_not_depend_on_batches(model, collection, batch_size, chunk_elements):
    usual = search(model, collection, depth=20)
    run = search(model, collection, depth=20, batch_size=batch_size, chunk_elements=chunk_elements)
    for qid in usual:
        assert list(run[qid]) == list(usual[qid])
        assert run[qid] == pytest.approx(usual[qid], abs=1e-5)


def test_a_student_can_search_documents_encoded_by_its_teacher(make_model, model, collection):
    teacher = make_model(seed=9)
    run = search(model, collection, document_model=teacher)
    vectors = search_vectors(
        (list(collection.queries), encode(model, list(collection.queries.values()), "query")),
        (
            list(collection.documents),
            encode(teacher, list(collection.documents.values()), "document"),
        ),
    )
    for qid in run:
        assert run[qid] == pytest.approx(vectors[qid], abs=1e-5)
    assert run != search(model, collection)


@pytest.mark.parametrize(("length", "stride"), [(5, 2), (4, 1), (7, 5), (40, 20)])
def test_passages_overlap_and_cover_the_text(model, collection, length, stride):
    for text in collection.documents.values():
        passages = cut_passages(text, model.tokenizer, length, stride)
        words, room = text.split(), length - 2
        if len(words) <= room:
            assert passages == [text]
            continue
        for index, passage in enumerate(passages):
            assert passage.split() == words[index * stride : index * stride + room]
        assert passages[-1].split()[-1] == words[-1] and len(passages[-1].split()) >= 1
        assert (len(passages) - 2) * stride + room < len(words)
    for invalid in ((2, 1), (5, 4), (5, 0)):
        with pytest.raises(ValueError, match="expected a length above the 2 special tokens and"):
            cut_passages("maji", model.tokenizer, *invalid)


def test_the_score_of_a_document_is_that_of_its_best_passage(model, collection):
    run = search(model, collection, passage_length=6, passage_stride=3, batch_size=7)
    cut = {
        f"{docid} {index}": passage
        for docid, text in collection.documents.items()
        for index, passage in enumerate(cut_passages(text, model.tokenizer, 6, 3))
    }
    pieces = Collection("cut", collection.queries, cut, collection.qrels)
    for qid, scores in search(model, pieces).items():
        best = {}
        for name, score in scores.items():
            docid = name.split()[0]
            best[docid] = max(score, best.get(docid, score))
        assert run[qid] == {docid: pytest.approx(s, abs=1e-5) for docid, s in best.items()}
        assert list(run[qid].items()) == ranked(run[qid])
    # The default stride is half the length, and a text that fits is not cut.
    usual = search(model, collection, passage_length=6)
    assert {q: s.keys() for q, s in usual.items()} == {q: s.keys() for q, s in run.items()}
    whole = search(model, collection, passage_length=64)
    for qid, scores in search(model, collection).items():
        assert whole[qid] == {docid: pytest.approx(s, abs=1e-5) for docid, s in scores.items()}
    with pytest.raises(ValueError, match="passage_length must be at least 1, found 0"):
        search(model, collection, passage_length=0)


def test_documents_whose_tokens_are_all_skipped_rank_last(make_model, collection, caplog):
    strict = make_model(skip=("[CLS]", "[SEP]", "ni", "moto"), expand=False)
    documents = {"a": "ni moto", "b": "maji", "c": ""}
    made = Collection("skipped", {"q": "maji"}, documents, {"q": {"b": 1}})
    run = search(strict, made, batch_size=1)
    assert list(run["q"]) == ["b", "c", "a"]
    assert run["q"]["a"] == run["q"]["c"] == EMPTY_DOCUMENT_SCORE


def test_models_of_different_dimension_are_refused(make_model, model, collection):
    with pytest.raises(ValueError, match="query vectors have 16 dimensions and document vectors 8"):
        search(model, collection, document_model=make_model(dim=8))


def test_other_invalid_arguments_are_refused(model, collection):
    with pytest.raises(ValueError, match="role must be 'query' or 'document', found 'passage'"):
        encode(model, ["maji"], "passage")
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        search(model, collection, batch_size=0)
    with pytest.raises(TypeError, match="MultiVectorEncoder, found str"):
        search("runs/sw/final", collection)

    class Dense:
        def encode_query(self, texts, **_):
            return torch.zeros(len(texts), 4)

    with pytest.raises(TypeError, match="model returns one vector for each text"):
        encode(Dense(), ["maji"], "query")


def test_a_model_that_returns_nan_is_reported(make_model, collection):
    broken = make_model()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="scores are not finite: a model returned NaN"):
        search(broken, collection)


def test_progress_is_shown_on_request(model, collection, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    search(model, collection, progress=True)
    assert "Searching" in capsys.readouterr().err
    search(model, collection)
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
def test_a_gpu_gives_the_same_run(make_model, collection):
    if not torch.cuda.is_available():
        pytest.skip(reason="needs a CUDA device")
    model = make_model()
    cpu = search(model, collection, depth=20)
    gpu = search(model, collection, depth=20, device="cuda")
    for qid in cpu:
        assert gpu[qid] == pytest.approx(cpu[qid], abs=1e-4)
