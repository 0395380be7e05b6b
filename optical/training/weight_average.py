"""The mean of the weights of students that were fine-tuned from one model ("model soup")."""

from __future__ import annotations

from typing import Any

from optical.models.fingerprint import fingerprints, partners, set_partners
from optical.models.retriever import load_retriever
from optical.training.options import AverageOptions


def average(options: AverageOptions) -> Any:
    """Average the weights of retrievers fine-tuned from one model.

    Source: Wortsman et al., Model soups (ICML 2022).

    Returns:
        The first retriever with the mean of all weights, each in its own dtype.

    Raises:
        FileNotFoundError, ValueError: no such model, or a model whose vocabulary or weight shapes
            differ from those of the first, which therefore has another starting point.
    """
    options.validate()
    first = load_retriever(options.models[0])
    sums = {name: value.double() for name, value in first.state_dict().items()}
    vocabulary = first.tokenizer.get_vocab()
    common_partners = _vector_spaces(first)
    for name in options.models[1:]:
        model = load_retriever(name)
        common_partners &= _vector_spaces(model)
        if model.tokenizer.get_vocab() != vocabulary:
            raise ValueError(
                f"models: {name} has another vocabulary than {options.models[0]}; expected "
                "students of one model"
            )
        weights = model.state_dict()
        for key in sums.keys() | weights.keys():
            shapes = [tuple(part[key].shape) if key in part else None for part in (weights, sums)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"models: {key} of {name} has the shape {shapes[0]}, expected that of "
                    f"{options.models[0]}, {shapes[1]}"
                )
            sums[key] += weights[key]
    # Copying converts each mean to the dtype of its weight, integers included.
    first.load_state_dict({key: total / len(options.models) for key, total in sums.items()})
    set_partners(first, common_partners)
    return first


def _vector_spaces(model: Any) -> set[str]:
    """Return the fingerprints of the model itself and of its partners.

    The teacher may be averaged with its students, whose partner it is.
    """
    return {*partners(model), *fingerprints(model).values()}
