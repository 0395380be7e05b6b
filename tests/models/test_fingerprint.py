"""Models are known by content, and stored vectors by the model that made them."""

import shutil

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Router

from optical.models.fingerprint import (
    fingerprints,
    load_partners,
    partners,
    save_partners,
    set_partners,
    share_space,
)
from optical.models.retriever import load_retriever


@pytest.fixture
def teacher(tiny_models):
    return load_retriever(tiny_models.teacher)


def test_a_fingerprint_survives_saving_loading_and_moving(teacher, tiny_models, tmp_path):
    expected = fingerprints(teacher)
    shutil.copytree(tiny_models.teacher, tmp_path / "copy")
    assert fingerprints(load_retriever(tmp_path / "copy")) == expected
    # A call leaves a truncation in the tokenizer.
    teacher.encode_document(["the child sees fish"])
    teacher.save_pretrained(str(tmp_path / "saved"))
    assert fingerprints(load_retriever(tmp_path / "saved")) == expected
    # A plain encoder gets a new pooler whenever it is loaded, if its checkpoint has none.
    assert fingerprints(load_retriever(tiny_models.mixed)) == fingerprints(
        load_retriever(tiny_models.mixed)
    )


def changed_weight(model):
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1e-3


def changed_prompt(model):
    model.prompts["document"] = "passage: "


def changed_length(model):
    model[0].document_length = 7


def changed_vocabulary(model):
    model.tokenizer.add_tokens(["samaki"])


def changed_configuration(model):
    model[0].auto_model.config.pad_token_id = 3


CHANGES = [
    changed_weight, changed_prompt, changed_length, changed_vocabulary, changed_configuration
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_everything_that_changes_vectors_changes_the_fingerprint(teacher, change):
    before = fingerprints(teacher)
    change(teacher)
    assert fingerprints(teacher)["document"] != before["document"]


def test_settings_of_queries_leave_the_fingerprint_of_documents(teacher):
    before = fingerprints(teacher)
    teacher[0].query_length = 7
    teacher.prompts["query"] = "query: "
    after = fingerprints(teacher)
    assert after["document"] == before["document"] and after["query"] != before["query"]


def test_a_router_has_the_fingerprints_of_its_encoders(teacher, tiny_models):
    query, document = load_retriever(tiny_models.mixed), teacher
    router = MultiVectorEncoder(modules=[Router.for_query_document(list(query), list(document))])
    found = fingerprints(router)
    assert found["query"] == fingerprints(query)["query"]
    assert found["document"] == fingerprints(document)["document"]


def test_models_share_a_space_by_content_or_by_a_recorded_partner(teacher, tiny_models, tmp_path):
    other = load_retriever(tiny_models.mixed)
    stored = fingerprints(teacher)["document"]
    assert share_space(teacher, stored, ())
    assert not share_space(other, stored, ())
    # The index was made by a student of the query model.
    assert share_space(other, "a student", tuple(fingerprints(other).values()))
    # The query model is a student of the model of the index.
    set_partners(other, fingerprints(teacher).values())
    assert share_space(other, stored, ())
    # Two students of one teacher.
    assert share_space(other, "another student", partners(other))
    save_partners(other, tmp_path)
    loaded = load_retriever(tiny_models.mixed)
    load_partners(loaded, tmp_path)
    assert partners(loaded) == partners(other) != ()


def test_a_damaged_record_of_partners_is_one_line(tiny_models, tmp_path):
    shutil.copytree(tiny_models.teacher, tmp_path / "copy")
    (tmp_path / "copy/partners.json").write_text('["a')
    with pytest.raises(ValueError, match=r"copy: cannot be loaded .*partners\.json is damaged"):
        load_retriever(tmp_path / "copy")
