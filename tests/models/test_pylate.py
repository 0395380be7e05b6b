"""Models exported for PyLate give equal vectors in both libraries."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Normalize

from optical.models.centering import center_vectors
from optical.models.pylate import export_pylate
from optical.models.retriever import load_retriever
from optical.retrieval.index import FileIndex, write_index

TEXTS = ["the teacher buys bread", "fish", "mwalimu ananunua mkate na samaki"]
# Python with PyLate, which cannot share an environment with Sentence Transformers 6.
PYLATE = os.environ.get("PYLATE_PYTHON", "")
ENCODE = """
import json, sys
import numpy as np
from pylate.models import ColBERT
model = ColBERT(sys.argv[1], device="cpu")
for role in ("query", "document"):
    vectors = model.encode(json.loads(sys.argv[3]), is_query=role == "query")
    np.savez(f"{sys.argv[2]}/{role}.npz", *vectors)
"""


@pytest.fixture(params=["plain", "projected", "expanded", "centred"])
def model(request, tiny_models, tmp_path):
    settings = {
        "plain": {},
        "projected": {"dimension": 8, "document_length": 6},
        "expanded": {"query_expansion": True, "query_length": 12},
        "centred": {"dimension": 8},
    }[request.param]
    retriever = load_retriever(tiny_models.mixed, **settings)
    if request.param == "centred":
        retriever = center_vectors(retriever, TEXTS)
    retriever.save_pretrained(str(tmp_path / "model"))
    return str(tmp_path / "model")


def encoded(name):
    model = load_retriever(name)
    return {
        role: [np.asarray(x) for x in getattr(model, f"encode_{role}")(TEXTS)]
        for role in ("query", "document")
    }


def assert_equal_vectors(actual, expected):
    for role in expected:
        assert [x.shape for x in actual[role]] == [x.shape for x in expected[role]]
        for one, other in zip(actual[role], expected[role], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_the_export_loads_here_with_equal_vectors(model, tmp_path):
    folder = export_pylate(model, tmp_path / "pylate")
    assert json.loads((folder / "config_sentence_transformers.json").read_text())["model_type"]
    assert not list(tmp_path.glob(".*"))
    assert_equal_vectors(encoded(folder), encoded(model))


@pytest.mark.slow
@pytest.mark.skipif(not PYLATE, reason="PYLATE_PYTHON names no Python with PyLate")
def test_the_export_loads_in_pylate_with_equal_vectors(model, tmp_path):
    folder = export_pylate(model, tmp_path / "pylate")
    command = [PYLATE, "-c", ENCODE, str(folder), str(tmp_path), json.dumps(TEXTS)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    exported = {}
    for role in ("query", "document"):
        with np.load(tmp_path / f"{role}.npz") as arrays:
            exported[role] = [arrays[name] for name in arrays.files]
    assert_equal_vectors(exported, encoded(model))


def test_one_encoder_of_a_router_is_exported(tiny_models, tmp_path):
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Router

    student, teacher = (
        load_retriever(tiny_models.mixed, dimension=8),
        load_retriever(tiny_models.wide, dimension=8),
    )
    both = MultiVectorEncoder(modules=[Router.for_query_document(list(student), list(teacher))])
    both.save_pretrained(str(tmp_path / "both"))
    with pytest.raises(ValueError, match="role: '', expected 'query' or 'document'"):
        export_pylate(tmp_path / "both", tmp_path / "whole")
    folder = export_pylate(tmp_path / "both", tmp_path / "queries", role="query")
    expected = student.encode_query(TEXTS)
    for one, other in zip(load_retriever(folder).encode_query(TEXTS), expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


def test_features_that_pylate_lacks_are_refused(tiny_models, tmp_path):
    def export(change=lambda model: None, **settings):
        retriever = load_retriever(tiny_models.mixed, **settings)
        change(retriever)
        retriever.save_pretrained(str(tmp_path / "model"))
        return export_pylate(tmp_path / "model", tmp_path / "out")

    def prompt(model):
        model.prompts["query"] = "find the fish: "

    with pytest.raises(ValueError, match="skips 1 words in queries"):
        export(skip_words=["the"])
    with pytest.raises(ValueError, match="query prompt 'find the fish: ' is not a single token"):
        export(prompt)
    with pytest.raises(ValueError, match="role: 'query', but the model has one encoder"):
        export_pylate(tiny_models.teacher, tmp_path / "out", role="query")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    Path(tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full: not empty"):
        export_pylate(tiny_models.teacher, tmp_path / "full")


def test_a_projection_of_normalised_vectors_is_refused(tiny_models, tmp_path):
    encoder, projection, *rest = load_retriever(tiny_models.mixed, dimension=8)
    modules = [encoder, Normalize(module_input_name="token_embeddings"), projection, *rest]
    MultiVectorEncoder(modules=modules).save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="projects normalised vectors"):
        export_pylate(tmp_path / "model", tmp_path / "pylate")


class Plaid:
    """The documented input of ``pylate.indexes.PLAID.add_documents``."""

    def __init__(self):
        self.documents = {}

    def add_documents(self, documents_ids, documents_embeddings, **kwargs):
        assert not kwargs and len(documents_ids) == len(documents_embeddings)
        for key, vectors in zip(documents_ids, documents_embeddings, strict=True):
            assert isinstance(key, str) and key not in self.documents
            assert isinstance(vectors, (np.ndarray, torch.Tensor)) and vectors.ndim == 2
            assert len(vectors) and vectors.dtype in (np.float32, torch.float32)
            self.documents[key] = np.asarray(vectors)
        return self


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_token_files_are_input_of_plaid(model, tmp_path, precision):
    texts = {f"d{i}": text for i, text in enumerate(TEXTS)}
    retriever = load_retriever(model)
    folder = write_index(
        retriever, texts.items(), tmp_path / "files", shard_texts=2, precision=precision
    )
    plaid = Plaid()
    for ids, tokens in FileIndex(folder).shards():
        plaid.add_documents(documents_ids=ids, documents_embeddings=tokens.split())
    # As `ColBERT.encode(texts, is_query=False)` of the exported model returns them.
    exported = encoded(export_pylate(model, tmp_path / "pylate"))["document"]
    assert list(plaid.documents) == list(texts)
    error = {"float32": 1e-6, "float16": 1e-3}[precision]
    for found, expected in zip(plaid.documents.values(), exported, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=error)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=error)


def test_the_export_has_the_files_and_keys_that_pylate_reads(model, tmp_path):
    folder = export_pylate(model, tmp_path / "pylate")
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    kinds = {
        "query_prefix": str, "document_prefix": str, "query_length": int, "document_length": int,
        "do_query_expansion": bool, "attend_to_expansion_tokens": bool, "skiplist_words": list,
    }  # fmt: skip
    assert {name: type(settings[name]) for name in kinds} == kinds
    modules = json.loads((folder / "modules.json").read_text())
    # A model without a projection gets the identity.
    projections = sum(type(module).__name__ == "Dense" for module in load_retriever(model))
    assert [entry["type"] for entry in modules] == [
        "sentence_transformers.models.Transformer",
        *["pylate.models.Dense.Dense"] * max(projections, 1),
    ]
    projection = folder / modules[1]["path"]
    keys = {"in_features", "out_features", "bias", "activation_function"}
    assert json.loads((projection / "config.json").read_text()).keys() == keys
    assert (projection / "model.safetensors").is_file()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file()
