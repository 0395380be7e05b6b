"""Names of effectiveness measures: those of ``ir_measures``, and those of ``trec_eval``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from optical.io.environment import require

# Names in trec_eval -> names in ir_measures, without and with a cutoff.
_TREC_EVAL = {
    "map": "AP",
    "ndcg": "nDCG",
    "recip_rank": "RR",
    "bpref": "Bpref",
    "num_ret": "NumRet",
    "num_rel": "NumRel",
    "num_rel_ret": "NumRelRet",
}
_TREC_EVAL_CUTOFFS = {
    "map_cut": "AP",
    "ndcg_cut": "nDCG",
    "P": "P",
    "recall": "R",
    "success": "Success",
    "iprec_at_recall": "IPrec",
}
_TREC_EVAL_CUTOFF = re.compile(rf"({'|'.join(_TREC_EVAL_CUTOFFS)})[_.](\d+(?:\.\d+)?)")
LARGEST_CUTOFF = 10**9
_SIMPLE = re.compile(r"(\w+)(?:@([1-9]\d*))?$")


def check_measures(measures: Sequence[str] | str) -> list[Any]:
    """Return the measures of ``ir_measures`` with some names, see :func:`evaluate`.

    Raises:
        ValueError: a measure is unknown or lacks its cutoff.
        ImportError: ``ir_measures`` is not installed.
    """
    ir_measures = require("ir_measures", "eval", "evaluation")
    if isinstance(measures, str):
        measures = re.split(r"[,\s]+(?![^(]*\))", measures.strip())
    if not measures or not all(measures):
        raise ValueError("no measure given; for example AP, nDCG@10 or R@100")
    return [_parse_measure(ir_measures, _from_trec_eval(measure)) for measure in measures]


def _from_trec_eval(name: str) -> str:
    """Return the name in ``ir_measures`` of a measure of ``trec_eval``, or the name unchanged."""
    if name in _TREC_EVAL:
        return _TREC_EVAL[name]
    match = _TREC_EVAL_CUTOFF.fullmatch(name)
    return f"{_TREC_EVAL_CUTOFFS[match[1]]}@{match[2]}" if match else name


def _parse_measure(ir_measures: Any, name: str) -> Any:
    simple = _SIMPLE.match(name)
    try:
        if simple is None:
            measure = ir_measures.parse_measure(name)
        else:
            # parse_measure uses parts of `ast` that Python 3.14 has removed.
            measure = ir_measures.measures.registry[simple[1]]
            measure = measure if simple[2] is None else measure @ int(simple[2])
        if not set(measure.params) <= set(measure.SUPPORTED_PARAMS) or name.endswith("@0"):
            raise ValueError(f"parameters {measure.params}")
        if measure.params.get("cutoff", 1) > LARGEST_CUTOFF:  # trec_eval's integers overflow
            raise ValueError(f"cutoff {measure.params['cutoff']}")
    except (AttributeError, AssertionError, LookupError, NameError, TypeError, ValueError) as error:
        raise ValueError(
            f"unknown measure {name!r}; for example AP, nDCG@10, R@100, RR@10 or P@5 "
            "(the names of ir_measures)"
        ) from error
    try:
        measure.validate_params()
    except AssertionError as error:
        raise ValueError(
            f"measure {name!r} is incomplete; measures such as R, P and Success need a cutoff, "
            "as in R@100, and others take none"
        ) from error
    return measure
