"""Each architecture family gives the same vectors after transfer, saving and loading."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")

import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from optical.models.encoding import encode
from optical.models.fingerprint import fingerprints
from optical.models.retriever import load_retriever
from optical.models.tokenizers import extend_tokenizer
from optical.training import TransferOptions, transfer

BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
T5_TOKENS = ["<pad>", "</s>", "<unk>"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = SIZES | {"intermediate_size": 32}
TEXTS = ["the child sees fish", "mtoto anaona samaki", "the teacher buys bread and water"]


def word_piece(texts, special):
    tokenizer = Tokenizer(
        models.WordPiece(unk_token=next(t for t in special if "unk" in t.lower()))
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    )
    return tokenizer


def byte_level(texts, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # As of ModernBERT, the special tokens come last, outside of the model's vocabulary.
    last = special is BERT_TOKENS
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[] if last else special
    )
    tokenizer.train_from_iterator(texts, trainer)
    if last:
        tokenizer.add_special_tokens(special)
    return tokenizer


def unigram(texts, special):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer)
    if special is T5_TOKENS:
        tokenizer.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])
    return tokenizer


# Family -> model class, its configuration, tokenizer, special tokens.
FAMILIES = {
    "BERT": ("Bert", BERT, word_piece, BERT_TOKENS),
    "RoBERTa": ("Roberta", BERT | {"max_position_embeddings": 258}, byte_level, ROBERTA_TOKENS),
    "XLM-R": ("XLMRoberta", BERT | {"max_position_embeddings": 258}, unigram, ROBERTA_TOKENS),
    "DistilBERT": (
        "DistilBert", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
        word_piece, BERT_TOKENS,
    ),
    "ModernBERT": ("ModernBert", BERT, byte_level, BERT_TOKENS),
    "MPNet": ("MPNet", BERT | {"max_position_embeddings": 258}, word_piece, ROBERTA_TOKENS),
    "T5": (
        "T5Encoder", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        unigram, T5_TOKENS,
    ),
}  # fmt: skip


def make_encoder(family, texts, folder):
    """Save an untrained encoder of a family with a tokenizer learnt from texts."""
    name, sizes, learn, special = FAMILIES[family]
    backend = learn(texts, special)
    ids = {token: backend.token_to_id(token) for token in special}
    first, last = ("[CLS]", "[SEP]") if special is BERT_TOKENS else ("<s>", "</s>")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}" if first in ids else f"$A {last}",
        special_tokens=[(token, ids[token]) for token in (first, last) if token in ids],
    )
    roles = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    if special is not BERT_TOKENS:
        roles = {"pad": special.index("<pad>"), "unk": special.index("<unk>")}
        if special is ROBERTA_TOKENS:
            roles |= {"cls": 0, "sep": 2, "mask": 4}
        else:
            roles |= {"eos": 1}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{role}_token": special[index] for role, index in roles.items()},
    )
    config_class = getattr(transformers, f"{name.removesuffix('Encoder')}Config")
    pad = tokenizer.pad_token_id
    config = config_class(
        vocab_size=len(tokenizer), pad_token_id=pad,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=ids[last], **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Untrained embeddings are too alike to tell two positions apart.
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpus(world):
    return (world / "text/en.txt").read_text().splitlines()


def vectors(model):
    return encode(model, TEXTS, "document").vectors


def positions(model):
    """Return the position numbers that an encoder looks up for a text, or None without a table."""
    table = getattr(getattr(model[0].auto_model, "embeddings", None), "position_embeddings", None)
    found = []
    if table is not None:
        hook = table.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].tolist()))
        encode(model, ["fish"], "document")
        hook.remove()
        return found[0][0][:3]
    return None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [False, True], ids=["new units", "keep"])
def test_transferred_models_are_the_same_after_saving_and_loading(
    family, keep, corpus, world, tmp_path
):
    name = make_encoder(family, corpus, tmp_path / "start")
    start = load_retriever(name)
    start.save_pretrained(str(tmp_path / "saved"))
    assert torch.equal(vectors(load_retriever(tmp_path / "saved")), vectors(start))

    bitext = [str(world / "bitext/en-sw.tsv")]
    options = TransferOptions(model=name, bitext=bitext, vocabulary_size=400, keep=keep)
    model = transfer(options)
    model.save_pretrained(str(tmp_path / "final"))
    loaded = load_retriever(tmp_path / "final")
    assert torch.equal(vectors(loaded), vectors(model))
    assert fingerprints(loaded) == fingerprints(model)
    assert positions(loaded) == positions(model) == positions(start)

    before, after = start.tokenizer.get_vocab(), model.tokenizer.get_vocab()
    table = model[0].auto_model.get_input_embeddings().weight
    assert len(after) == len(table) and max(after.values()) < len(table)
    if FAMILIES[family][3] is ROBERTA_TOKENS:
        # These number the positions of a text from the padding token's id.
        assert model.tokenizer.pad_token_id == start.tokenizer.pad_token_id == 1
    if keep:
        # Swahili has units of its own, and English is read as before.
        tokens = model.tokenizer.tokenize("mwalimu anaona samaki")
        assert len(tokens) < len(start.tokenizer.tokenize("mwalimu anaona samaki"))
        assert model.tokenizer.unk_token_id not in model.tokenizer("mwalimu")["input_ids"]
        english = "the child sees bread"
        assert model.tokenizer.tokenize(english) == start.tokenizer.tokenize(english)
        if FAMILIES[family][2] is not word_piece:
            assert {token: after[token] for token in before} == before


@pytest.mark.parametrize("learn", [unigram, byte_level])
def test_extended_tokenizers_are_equal_for_equal_texts(learn, corpus, world):
    backend = learn(corpus, ROBERTA_TOKENS)
    start = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    texts = [line.split("\t")[1] for line in (world / "bitext/en-sw.tsv").open(encoding="utf-8")]
    one, two = (extend_tokenizer(start, texts, 350) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert len(one) > len(start)
    assert one.decode(one("mwalimu")["input_ids"]).strip() == "mwalimu"
