"""Exact MaxSim search, BM25, persistent indexes, evaluation and significance tests."""

from optical.retrieval.bm25 import search_bm25
from optical.retrieval.evaluation import Evaluation, compare, evaluate
from optical.retrieval.exact_search import search, search_vectors
from optical.retrieval.index import open_index, write_database, write_index

__all__ = [
    "Evaluation",
    "compare",
    "evaluate",
    "open_index",
    "search",
    "search_bm25",
    "search_vectors",
    "write_database",
    "write_index",
]
