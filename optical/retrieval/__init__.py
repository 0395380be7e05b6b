"""Exact MaxSim search, BM25, persistent indexes, evaluation and significance tests.

Names are imported on first use: evaluation and statistics need no PyTorch, which searches import.
"""

from typing import TYPE_CHECKING

from optical.io.lazy import on_demand

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # a type checker would accept any name
    __getattr__ = on_demand(
        __name__,
        {
            "bm25": ("search_bm25",),
            "evaluation": ("Evaluation", "compare", "evaluate"),
            "exact_search": ("search", "search_vectors"),
            "index": ("open_index", "write_database", "write_index"),
        },
    )
