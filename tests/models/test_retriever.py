"""Pretrained encoders, tokenizers and retrievers built from them."""

import gzip
import json
import random
import shutil

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from sentence_transformers import MultiVectorEncoder
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
    TrainingArguments,
)

from optical.data.texts import read_sentences
from optical.models import tokenizers
from optical.models.retriever import check_model, load_retriever, resolve_model, set_dropout
from optical.models.token_store import write_vectors
from optical.models.tokenizers import SPECIAL_TOKENS, frequent_tokens, train_tokenizer
from optical.training import BitextCollator
from optical.training.options import EncoderOptions
from optical.training.pretraining import encoder_trainer

SENTENCE = "the teacher buys the bread"


def encode(model, text, task="document"):
    method = model.encode_query if task == "query" else model.encode_document
    return method([text], output_value=None, show_progress_bar=False)[0]


def test_a_pretrained_encoder_reloads_with_transformers(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.mixed)
    model = AutoModel.from_pretrained(tiny_models.mixed).eval()
    assert model.config.hidden_size == 16 and model.config.num_hidden_layers == 1
    assert model.config.vocab_size == len(tokenizer) <= 200
    ids = tokenizer(SENTENCE.upper())["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[0] == "[CLS]" and words[-1] == "[SEP]" and "[UNK]" not in words
    assert tokenizer.decode(ids, skip_special_tokens=True) == SENTENCE
    assert [getattr(tokenizer, f"{name.strip('[]').lower()}_token") for name in SPECIAL_TOKENS] == (
        list(SPECIAL_TOKENS)
    )
    with torch.no_grad():
        hidden = model(**tokenizer([SENTENCE], return_tensors="pt")).last_hidden_state
    assert hidden.shape == (1, len(ids), 16) and hidden.isfinite().all()
    # A retriever built from the folder has the same weights.
    retriever = load_retriever(tiny_models.mixed)
    expected = torch.nn.functional.normalize(hidden[0], dim=-1)
    torch.testing.assert_close(encode(retriever, SENTENCE)["token_embeddings"], expected)


def test_the_masked_language_model_head_reloads(tiny_models):
    model, loading = AutoModelForMaskedLM.from_pretrained(
        tiny_models.mixed, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size


def test_tokenizers_keep_the_letters_of_every_script():
    texts = ["शिक्षक बाज़ारात भाकरी विकत घेतो", "Äpfel über Straße", "l ' été à l ' école", "ñandú"]
    for vocabulary_size in (70, 500):  # subwords, and whole words
        tokenizer = train_tokenizer(iter(texts * 3), vocabulary_size, 64)
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text.lower()


def test_equal_texts_give_equal_tokenizers():
    # Many ties: which tokens are learnt depends on how the letters are numbered.
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgłéह", k=draw.randint(2, 9))) for _ in range(300)]
    learnt = [train_tokenizer(iter(words), 150, 32) for _ in range(3)]
    assert learnt[0].get_vocab() == learnt[1].get_vocab() == learnt[2].get_vocab()
    assert len(learnt[0]) == 150
    # Word-internal letters are ordinary tokens, not special ones.
    assert learnt[0].all_special_tokens and set(learnt[0].all_special_tokens) == set(SPECIAL_TOKENS)
    assert learnt[0].tokenize("##a") == ["[UNK]", "[UNK]", "a"]


def test_rare_letters_are_excluded_from_the_alphabet():
    letters = [chr(0x4E00 + i) for i in range(1200)]
    tokenizer = train_tokenizer(iter(["".join(letters[:600]) * 2, "".join(letters)]), 3000, 32)
    assert len(tokenizer.tokenize(letters[0])) == 1 and tokenizer.tokenize(letters[0]) != ["[UNK]"]
    assert tokenizer.tokenize(letters[-1]) == ["[UNK]"]


def test_sentence_pairs_are_concatenated_for_pretraining(world, tmp_path):
    options = EncoderOptions(
        text=[str(world / "text/en.txt")],
        bitext=[str(world / "bitext/en-sw.tsv")],
        vocabulary_size=150,
        hidden_size=16,
        layers=1,
    )
    args = TrainingArguments(str(tmp_path), report_to="none", seed=3)
    trainer = encoder_trainer(options, args)
    rows = trainer.train_dataset["input_ids"]
    tokenizer = trainer.processing_class
    texts = len((world / "text/en.txt").read_text().splitlines())
    english, other = (world / "bitext/en-sw.tsv").read_text().splitlines()[0].split("\t")
    assert tokenizer.decode(rows[texts]) == f"[CLS] {english} [SEP] {other} [SEP]"
    assert rows[0].count(tokenizer.sep_token_id) == 1
    # The seed of the arguments determines the initial weights.
    again = encoder_trainer(options, args).model.state_dict()
    assert all(
        torch.equal(again[name], value) for name, value in trainer.model.state_dict().items()
    )


def test_long_texts_are_truncated(world, tmp_path):
    (tmp_path / "long.txt").write_text("the teacher buys the bread " * 50 + "\n")
    options = EncoderOptions(text=[str(tmp_path / "long.txt")], hidden_size=16, max_tokens=12)
    trainer = encoder_trainer(options, TrainingArguments(str(tmp_path), report_to="none"))
    assert [len(row) for row in trainer.train_dataset["input_ids"]] == [12]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"maji\n\n uhai \n", ["maji", "uhai"]),
        ("a.txt.gz", gzip.compress(b"maji\n", mtime=0), ["maji"]),
        ("a.jsonl", b'{"id": 1, "text": "maji"}\n\n{"text": " "}\n', ["maji"]),
    ],
)
def test_sentences_are_read_from_text_and_json_lines(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert read_sentences(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\n \n", r"a\.txt: no text in it; expected one sentence per line"),
        ("a.txt", b"maji\n\xff\n", r"a\.txt:2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"title": "a"}\n', r"a\.jsonl:1: no key `text`"),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl:1: no key `text`"),
        ("a.txt", b"\x1f\x8b\x08", r"a\.txt:1: damaged gzip"),
    ],
)
def test_errors_of_malformed_text_name_file_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_sentences(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "text, bitext: no file given, expected at least one"),
        ({"text": ["a"], "hidden_size": 16, "heads": 3}, "heads: 3, expected a divisor"),
    ],
)
def test_invalid_options_are_refused_before_reading_files(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderOptions(**options).validate()


# --- retrievers ----------------------------------------------------------------------------------


def module_names(model):
    return [type(module).__name__ for module in model]


def test_no_projection_is_added_if_the_width_matches(tiny_models):
    for dimension in (None, 16):
        model = load_retriever(tiny_models.mixed, dimension=dimension)
        assert module_names(model) == ["Transformer", "MultiVectorMask", "Normalize"]
        assert model.get_embedding_dimension() == 16


def test_a_dimension_adds_a_projection(tiny_models):
    model = load_retriever(tiny_models.mixed, dimension=8)
    assert module_names(model) == ["Transformer", "Dense", "MultiVectorMask", "Normalize"]
    vectors = encode(model, SENTENCE)["token_embeddings"]
    assert model.get_embedding_dimension() == vectors.shape[-1] == 8
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))


def test_length_limits_and_query_expansion(tiny_models):
    model = load_retriever(tiny_models.mixed, query_length=5, document_length=9)
    assert encode(model, "water " * 30, "query")["input_ids"].shape == (5,)
    assert encode(model, "water " * 30)["input_ids"].shape == (9,)
    model = load_retriever(tiny_models.mixed, query_length=12, query_expansion=True)
    output = encode(model, "water", "query")
    assert output["input_ids"].shape == (12,) and output["attention_mask"].all()
    assert output["input_ids"].tolist().count(model.tokenizer.mask_token_id) >= 8
    assert len(encode(model, "water")["input_ids"]) < 12


def test_skipped_words_are_masked_in_queries_only_also_after_reloading(tiny_models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.mixed)
    frequent = frequent_tokens(tokenizer, [SENTENCE, "the the bread"], 2)
    assert frequent == ["the", "bread"]
    model = load_retriever(tiny_models.mixed, skip_words=frequent, query_length=20)
    model.save_pretrained(str(tmp_path / "model"))
    for retriever in (model, load_retriever(tmp_path / "model")):
        query, document = (encode(retriever, SENTENCE, task) for task in ("query", "document"))
        tokens = tokenizer.convert_ids_to_tokens(query["input_ids"])
        expected = [token not in frequent for token in tokens]
        assert query["attention_mask"].bool().tolist() == expected and not all(expected)
        assert document["attention_mask"].all()
    # A saved retriever keeps its own settings.
    reloaded = load_retriever(tmp_path / "model", dimension=4, query_length=5, skip_words=[])
    assert reloaded.get_embedding_dimension() == 16
    assert torch.equal(encode(reloaded, SENTENCE)["token_embeddings"], document["token_embeddings"])


def test_subwords_can_be_skipped(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.wide)
    subwords = [token for token in tokenizer.get_vocab() if token.startswith("##")]
    ids = tokenizer.convert_tokens_to_ids(subwords)
    model = load_retriever(tiny_models.wide, skip_words=subwords)
    output = encode(model, "teachers farmers mwalimux", "query")
    skipped = [token in ids for token in output["input_ids"].tolist()]
    assert any(skipped)
    assert output["attention_mask"].bool().tolist() == [not skip for skip in skipped]


def test_equally_frequent_tokens_are_in_vocabulary_order(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.mixed)
    texts = ["water fish book lamp"]
    orders = {tuple(frequent_tokens(tokenizer, texts * n, 4)) for n in (1, 5)}
    orders.add(tuple(frequent_tokens(tokenizer, ["lamp book fish water"], 4)))
    (order,) = orders
    ids = tokenizer.convert_tokens_to_ids(list(order))
    assert ids == sorted(ids)
    assert frequent_tokens(tokenizer, texts, 0) == []


def test_saved_models_need_sentence_transformers_only(tiny_models, tmp_path):
    load_retriever(tiny_models.mixed, dimension=8, skip_words=["the"]).save_pretrained(
        str(tmp_path / "model")
    )
    modules = json.loads((tmp_path / "model/modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert MultiVectorEncoder(str(tmp_path / "model")).get_embedding_dimension() == 8


def broken(models, folder, name):
    shutil.copytree(models.mixed, folder)
    if name == "config.json":
        (folder / name).write_text("{")
    else:
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}/nothing", "no such folder; train it first or use a hub name"),
        ("./nothing", "no such folder"),
        ("runs/no-such/final", "no such folder"),
        ("{tmp}", r"no config\.json in this folder, so it holds no model"),
        ("nobody/no-such-model", "cannot be loaded"),
        ("no-such-model", "cannot be loaded"),
    ],
)
def test_errors_of_a_missing_model_have_one_line(tmp_path, name, message):
    name = name.format(tmp=tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_retriever(name)
    assert str(error.value).startswith(f"model {name}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "cannot be loaded"),
        ("model.safetensors", r"model\.safetensors is damaged"),
        ("tokenizer.json", "cannot be loaded"),
    ],
)
def test_errors_of_a_damaged_model_have_one_line(tiny_models, tmp_path, name, message):
    folder = broken(tiny_models, tmp_path / "model", name)
    with pytest.raises(ValueError, match=message) as error:
        load_retriever(folder)
    assert str(error.value).startswith(f"model {folder}: ") and "\n" not in str(error.value)


# --- models in packages, and fertility ----------------------------------------------------------


def test_a_model_may_be_part_of_an_installed_package(tiny_models, tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    shutil.copytree(tiny_models.mixed, package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    name = "package:some_weights/model"
    assert resolve_model(name) == str(package / "model") and resolve_model("a/b") == "a/b"
    check_model(name)
    assert load_retriever(name).get_embedding_dimension() == 16
    # A model of one vector per text is loaded as its encoder.
    (package / "model/modules.json").write_text(
        json.dumps([{"type": "x.Transformer"}, {"type": "x.Pooling"}])
    )
    assert load_retriever(name, dimension=8).get_embedding_dimension() == 8
    with pytest.raises(ValueError, match="the package no_weights is not installed; install it"):
        check_model("package:no_weights/model")
    with pytest.raises(ValueError, match="no such folder"):
        check_model("package:some_weights/missing/folder")


def test_fertility(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.mixed)
    assert tokenizers.fertility(tokenizer, ["mwalimu mkate", "taa"]) == {
        "tokens": 1.0,
        "unknown": 0.0,
    }
    statistics = tokenizers.fertility(tokenizer, ["mwalimu 漢字"])
    assert statistics["unknown"] > 0 and statistics["tokens"] >= 1


@pytest.fixture
def bert(tiny_models, tmp_path):
    """A plain encoder with 64 learnt positions, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.mixed)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, max_position_embeddings=64, **sizes
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_lengths_without_room_for_a_token_are_refused(bert, tmp_path):
    with pytest.raises(ValueError, match="query_length is 2, all of which the 2 special tokens"):
        load_retriever(bert, query_length=2, document_length=64)
    model = load_retriever(bert, document_length=64)
    with pytest.raises(ValueError, match="max_length: 1, but the tokenizer adds 2 special tokens"):
        write_vectors(model, ["a"], tmp_path / "v", role="document", max_length=1)


def test_lengths_beyond_the_positions_are_refused(bert, tmp_path):
    with pytest.raises(
        ValueError, match="document_length is 180, but the encoder has 64 positions"
    ):
        load_retriever(bert, document_length=180)
    with pytest.raises(ValueError, match="query_length is 65, but the encoder has 64 positions"):
        load_retriever(bert, query_length=65, document_length=64)
    model = load_retriever(bert, document_length=64)
    long_text = 100 * "the teacher buys the bread "
    assert len(encode(model, long_text)["input_ids"]) == 64
    with pytest.raises(ValueError, match="max_length: 65, but the encoder has 64 positions"):
        write_vectors(model, [long_text], tmp_path / "store", role="document", max_length=65)
    with pytest.raises(ValueError, match="max_length: 65, but the encoder has 64 positions"):
        BitextCollator(model, model, role="document", max_length=65)
    # A model without its own limits is limited by its positions.
    model[0].document_length = None
    model.save_pretrained(str(tmp_path / "saved"))
    assert len(encode(load_retriever(tmp_path / "saved"), long_text)["input_ids"]) == 64
    model[0].document_length = 65
    model.save_pretrained(str(tmp_path / "longer"))
    with pytest.raises(ValueError, match="longer: document_length is 65, but the encoder has 64"):
        load_retriever(tmp_path / "longer")


def test_default_lengths_end_at_the_positions(bert, caplog):
    caplog.set_level("INFO", logger="optical")
    model = load_retriever(bert)
    assert (model[0].query_length, model[0].document_length) == (32, 64)
    (line,) = [record.message for record in caplog.records if "positions" in record.message]
    assert line == f"model {bert}: document_length is 64, all positions of the encoder"
    model = load_retriever(bert, query_expansion=True, default_lengths=(100, 50))
    assert (model[0].query_length, model[0].document_length) == (64, 50)
    assert model[0].query_expansion["length"] == 64


def test_encoders_that_number_positions_from_the_padding_have_fewer(bert, tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tokenizer = AutoTokenizer.from_pretrained(bert)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, max_position_embeddings=66, **sizes
    )
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    with pytest.raises(ValueError, match="document_length is 65, but the encoder has 64 positions"):
        load_retriever(tmp_path / "roberta", document_length=65)
    model = load_retriever(tmp_path / "roberta", document_length=64)
    assert len(encode(model, 100 * "the bread ")["input_ids"]) == 64


def test_a_folder_without_tokenizer_files_is_refused(bert):
    for path in bert.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="tokenizer has no units but the 5 special tokens"):
        load_retriever(bert, document_length=64)


def test_a_tokenizer_with_more_units_than_input_vectors_is_refused(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    size = len(tokenizer)
    tokenizer.add_tokens(["zzyqx"])
    tokenizer.save_pretrained(bert)
    message = f"tokenizer has {size + 1} units and its encoder {size} input vectors"
    with pytest.raises(ValueError, match=message):
        load_retriever(bert, document_length=64)


def test_custom_code_is_refused_without_asking(bert, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    code = ["from transformers import BertConfig as C", f"open({str(ran)!r}, 'w').close()"]
    (bert / "custom.py").write_text("\n".join(code))
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "unheard", "auto_map": {"AutoConfig": "custom.C"}}
    (bert / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    with pytest.raises(ValueError, match="bert: cannot be loaded"):
        load_retriever(bert, document_length=64)
    assert not asked and not ran.exists()


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert", "modernbert"])
def test_dropout_of_all_places_of_an_encoder(family):
    """With probability 0, training mode computes what evaluation mode computes."""
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    config = AutoConfig.for_model(family, vocab_size=50, sep_token_id=2, **sizes, **tokens)
    for name in list(vars(config)):
        if "dropout" in name and name != "classifier_dropout":
            setattr(config, name, 0.3)
    encoder = AutoModel.from_config(config)
    ids = torch.arange(3, 23)[None]
    expected = encoder.eval()(ids).last_hidden_state
    encoder.train()
    assert (encoder(ids).last_hidden_state - expected).abs().max() > 0.01
    set_dropout(encoder, None)
    assert (encoder(ids).last_hidden_state - expected).abs().max() > 0.01
    set_dropout(encoder, 0.0)
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected)
    set_dropout(encoder, 0.3)
    assert (encoder(ids).last_hidden_state - expected).abs().max() > 0.01
