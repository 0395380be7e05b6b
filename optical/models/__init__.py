"""Late-interaction retrievers: loading, tokenizers, encoding, token stores and word alignment."""

from optical.models.encoding import TokenVectors, encode
from optical.models.pylate import export_pylate
from optical.models.retriever import load_retriever
from optical.models.token_store import StoredVectors, write_vectors
from optical.models.word_alignment import align_tokens, align_words, word_links

__all__ = [
    "StoredVectors",
    "TokenVectors",
    "align_tokens",
    "align_words",
    "encode",
    "export_pylate",
    "load_retriever",
    "word_links",
    "write_vectors",
]
